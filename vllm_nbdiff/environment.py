# SPDX-License-Identifier: Apache-2.0
"""The environment that an engine's processes start with on a CPU; what is set there stays."""

from __future__ import annotations

import os
import re
import sys


def set_cpu_environment() -> None:
    """Set what is not set yet."""
    _preload_intel_openmp()
    _load_compiled_models()


def _preload_intel_openmp() -> None:
    """Have the workers run on Intel's OpenMP runtime, which the CPU wheel brings along.

    vLLM preloads torch's libgomp unless an OpenMP runtime is preloaded already; Intel's is faster
    and vLLM's documentation recommends it.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    library = os.path.join(sys.prefix, "lib", "libiomp5.so")
    if os.path.exists(library) and not re.search("libi?omp|libgomp", preloaded):
        os.environ["LD_PRELOAD"] = f"{preloaded}:{library}" if preloaded else library


def _load_compiled_models() -> None:
    """Have a second start load what the first one compiled.

    vLLM compiles ahead of time by default, and on a CPU, where Inductor is all that compiles,
    cannot load what it saves of that: every start compiles anew.

    Upstream: `_try_load_aot_compiled_fn` (vllm/compilation/decorators.py), which asks the loaded
    function for `finalize_loading`; Inductor's has none. Remove when `tests/test_environment.py`
    says so.
    """
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
