# SPDX-License-Identifier: Apache-2.0
"""The stages, in the order in which they run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scripts.gpu_check import engines
from scripts.gpu_check.options import Options
from scripts.gpu_check.result import Result, Skip

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["ROOT", "STAGES", "Options", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One stage, the seconds that it may take, and what its process finds in its environment."""

    run: Callable[[Options], Result]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)


def command(*arguments: str, **variables: str) -> tuple[int, str]:
    """Run Python with arguments and environment variables, showing what it prints.

    Returns its exit status and standard output.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def environment(options: Options) -> Result:
    """versions, device, and the installation step by step"""
    import torch
    import triton
    import vllm

    import vllm_nbdiff

    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
        "vllm_nbdiff": vllm_nbdiff.__version__,
        "commit": commit(),
    }
    if not options.toy:
        if not torch.cuda.is_available():
            return Result("failed", "there is no usable GPU; --toy runs on a CPU", figures)
        device = torch.cuda.get_device_properties(0)
        figures |= {
            "device": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory_gib": str(round(device.total_memory / 2**30, 1)),
            "cuda": str(torch.version.cuda),
        }
    detail = ", ".join(f"{name} {value}" for name, value in figures.items())
    status, _ = command("-m", "vllm_nbdiff")
    return Result("ok" if status == 0 else "wrong", detail, figures)


def commit() -> str:
    """Of this checkout, "-dirty" where it has changes."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def kernels(options: Options) -> Result:
    """the kernels' tests, on the device"""
    chosen = "tests/kernels/test_uniform.py" if options.toy else "tests/kernels"
    device = "cpu" if options.toy else "cuda"
    pytest = ("-m", "pytest", "-v", "-p", "no:cacheprovider", chosen)
    status, output = command(*pytest, NBDIFF_KERNELS_ON=device)
    last = output.strip().splitlines()[-1] if output.strip() else "no output"
    return Result("ok" if status == 0 else "wrong", last)


def compiled(options: Options) -> Result:
    """registers, stack and shared memory of the compiled kernels"""
    if options.toy:
        raise Skip("tests/kernels/test_compile.py does it without a GPU")
    import torch

    major, minor = torch.cuda.get_device_capability()
    target, shape = f"{major}{minor}", ("--groups", "4", "--heads", "128")
    status, output = command("tests/kernels/compile_report.py", "--targets", target, *shape)
    rows = [line.split("\t") for line in output.splitlines()][1:]
    spilled = sorted({row[2] for row in rows if int(row[4])})
    good = status == 0 and rows and not spilled
    detail = f"{len(rows)} launches" + (f", spills in {', '.join(spilled)}" if spilled else "")
    return Result("ok" if good else "wrong", detail, {"launches": rows})


def benchmark(options: Options) -> Result:
    """a short benchmark of the kernels, on random data, each result checked before it is timed"""
    toy = ["--toy", "--requests", "1", "--contexts", "19"]
    real = ["--requests", "1", "8", "--contexts", "8192", "32768"]
    status, output = command("-m", "benchmarks.kernels", *(toy if options.toy else real))
    rows = [line.split("\t") for line in output.splitlines() if not line.startswith("#")]
    attention = [row for row in rows if row[0] == "segment_attention" and row[3] == "ours"]
    best = max((float(row[6]) for row in attention), default=0.0)
    detail = f"{len(rows) - 1} figures; attention at {best:.0%} of copy bandwidth at best"
    if options.toy:
        detail = f"{len(rows) - 1} figures that mean nothing"
    if failed := [line for line in output.splitlines() if line.startswith("# failed")]:
        detail += f"; {len(failed)} contenders failed"
    good = status == 0 and bool(attention)
    return Result("ok" if good else "wrong", detail, {"rows": rows, "failed": failed})


# Nothing that hides what happened in another process; the check of synchronisation is vLLM's.
_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_MONITORED = _IN_PROCESS | {"VLLM_GPU_SYNC_CHECK": "error"}

STAGES: dict[str, Stage] = {
    "environment": Stage(environment, 300),
    "kernels": Stage(kernels, 900),
    "compiled": Stage(compiled, 600),
    "benchmark": Stage(benchmark, 600),
    "eager": Stage(engines.eager, 600, _IN_PROCESS),
    "full-graphs": Stage(engines.full_graphs, 900, _IN_PROCESS),
    "default": Stage(engines.default, 900, _IN_PROCESS),
    "monitored": Stage(engines.monitored, 900, _MONITORED),
    "memory": Stage(engines.memory, 600, _IN_PROCESS),
    "model": Stage(engines.model, 3600, _IN_PROCESS),
}
