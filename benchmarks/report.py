# SPDX-License-Identifier: Apache-2.0
"""From samples to the rows that a run ends with, and what is needed to run it again."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from os import environ, sched_getaffinity
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engines import Sample

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of the result: medians over the rounds, `exact` and `tpf` over all of them."""

    model: str
    mode: str
    batch: int
    tokens_per_s: float
    ratio_to_ar: float
    """tokens_per_s over that of AR in the same run."""
    exact: float | None
    """Right answers in percent; None where there is nothing to check."""
    tpf: float
    """Generated tokens per decode forward of a request."""
    step_over_bare: float
    """Wall time over the part of it spent in the model's forward and logits."""
    rounds: int
    """That were measured."""


def make_row(model: str, mode: str, batch: int, samples: dict[str, list[Sample]]) -> Row:
    """The row of `mode` out of the samples of both modes."""
    speed = {m: median(s.tokens / s.seconds for s in samples[m]) for m in samples}
    own = samples[mode]
    problems = sum(s.problems for s in own)
    return Row(
        model=model,
        mode=mode,
        batch=batch,
        tokens_per_s=round(speed[mode], 1),
        ratio_to_ar=round(speed[mode] / speed["ar"], 3),
        exact=round(100 * sum(s.exact for s in own) / problems, 1) if problems else None,
        tpf=round(sum(s.tokens for s in own) / sum(s.forwards for s in own), 3),
        step_over_bare=round(median(s.seconds / s.model_seconds for s in own), 3),
        rounds=len(own),
    )


def save(
    name: str, results: Sequence[Any], settings: dict[str, Any], module: str = "benchmarks"
) -> None:
    """Write `results` to results/NAME.json, with the `settings` of the run, its command, versions,
    machine and commit."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**_provenance(settings, module), "results": results}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _provenance(settings: dict[str, Any], module: str) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("vllm", "vllm-nbdiff", "torch", "transformers")},
        },
        "cpu": _cpu_model(),
        "cores": len(sched_getaffinity(0)),
        "preloaded": [Path(path).name for path in _preloaded()],
        "commit": _commit(),
    }


def _version(name: str) -> str:
    if name == "vllm":
        import vllm

        return vllm.__version__
    return version(name)


def _cpu_model() -> str:
    lines: Sequence[str] = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _preloaded() -> list[str]:
    return [path for path in environ.get("LD_PRELOAD", "").split(":") if path]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    root = Path(__file__).parent
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
