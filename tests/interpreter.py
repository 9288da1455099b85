# SPDX-License-Identifier: Apache-2.0
"""Kernels without a GPU: in Triton's interpreter."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction
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
    GridExecutor.__call__ = _launch
    for name, module in list(sys.modules.items()):
        if name.startswith(("triton.language", "vllm_nbdiff.kernels")):
            for attribute, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    numbers = function.do_not_specialize
                    own = InterpretedFunction(function.fn, do_not_specialize=numbers)
                    setattr(module, attribute, own)


def _with_room_for_frames(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` called from a large frame.

    CPython takes memory for frames from the system 16 KiB at a time and gives it back when the
    first of them returns, which is up to half the time of a kernel where that is a call in its
    loops. Of what a frame of just more than 512 KiB takes as much is left for all frames behind it.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=1 << 16)
    return call


_launch = _with_room_for_frames(GridExecutor.__call__)


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
