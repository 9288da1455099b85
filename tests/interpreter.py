# SPDX-License-Identifier: Apache-2.0
"""Kernels without a GPU: in Triton's interpreter, or replaced by their references."""

import sys
from types import ModuleType
from typing import Any

import pytest
import triton
import triton.language
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

ROW_KERNELS = ("row_statistics", "row_sample")
CANVAS_KERNELS = ("canvas_rows", "canvas_update", "canvas_advance")


def interpret_kernels() -> None:
    """Act as if TRITON_INTERPRET=1 had been set before the first import of triton.

    The setting is read when a function is decorated, and another directory's tests may have
    imported triton by now; an environment variable would also leak into the servers they start.
    """
    triton.knobs.runtime.interpret = True
    for name, module in list(sys.modules.items()):
        if name.startswith(("triton.language", "vllm_nbdiff.kernels")):
            for attribute, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    setattr(module, attribute, InterpretedFunction(function.fn))


def use_references(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> None:
    """Let `module` call the plain-PyTorch references of the kernels `names`: the interpreter takes
    a millisecond for every program."""
    for name in names:
        kernels = sys.modules[getattr(module, name).__module__]
        reference = getattr(kernels, f"{name}_reference")

        def call(*args: Any, reference: Any = reference, **kwargs: Any) -> Any:
            kwargs.pop("check_values", None)
            result = reference(*args, **kwargs)
            return type(result)(*(x.float() if x.is_floating_point() else x for x in result))

        monkeypatch.setattr(module, name, call)
