# SPDX-License-Identifier: Apache-2.0
"""Kernels without a GPU: in Triton's interpreter."""

import sys

import triton
import triton.language
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


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
