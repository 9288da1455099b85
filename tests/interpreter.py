# SPDX-License-Identifier: Apache-2.0
"""Kernels without a GPU: in Triton's interpreter."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

_patch_lang = interpreter._patch_lang


def _patch_once(function: Any) -> Any:
    """Nothing where the launch around a device function has patched all of the language.

    Triton looks at every builtin again for each call of one, which takes longer than the call.
    """
    languages = [m for m in function.__globals__.values() if m is tl or m is tl.core]
    first = [x for language in languages for x in (language.arange, language.tensor.__add__)]
    if any(map(tl.core.is_builtin, first)):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


def interpret_kernels() -> None:
    """Act as if TRITON_INTERPRET=1 had been set before the first import of triton.

    The setting is read when a function is decorated, and another directory's tests may have
    imported triton by now; an environment variable would also leak into the servers they start.
    """
    triton.knobs.runtime.interpret = True
    interpreter._patch_lang = _patch_once
    for name, module in list(sys.modules.items()):
        if name.startswith(("triton.language", "vllm_nbdiff.kernels")):
            for attribute, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    numbers = function.do_not_specialize
                    own = InterpretedFunction(function.fn, do_not_specialize=numbers)
                    setattr(module, attribute, own)


Specialisations = set[tuple[Any, ...]]


@contextmanager
def recorded_launches() -> Iterator[Specialisations]:
    """What Triton would compile on a CUDA device for the launches of the plugin's kernels."""
    found: Specialisations = set()
    run = InterpretedFunction.run

    def record(
        self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> Any:
        if self.fn.__module__.startswith("vllm_nbdiff"):
            found.add(_specialisation(self, *args, **kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = record
    try:
        yield found
    finally:
        InterpretedFunction.run = run


def _specialisation(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Equal for launches of one compiled kernel."""
    parameters = inspect.signature(kernel.fn).parameters
    given = dict(zip(parameters, args, strict=False)) | kwargs
    key = []
    for name, parameter in parameters.items():
        value = given.pop(name)
        if "constexpr" in str(parameter.annotation):
            key.append(value)
        else:
            varies = name in (kernel.kwargs.get("do_not_specialize") or ())
            key.append(native_specialize_impl(CUDABackend, value, False, not varies, True))
    return kernel.fn.__name__, *key, *given.items()
