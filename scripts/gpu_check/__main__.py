# SPDX-License-Identifier: Apache-2.0
"""Checks this GPU, stage by stage: each in a process of its own, with a limit; a failure ends none
of the others. A table comes last, JSON goes to a file; exit status 1 after any wrong result.

    python -m scripts.gpu_check                      # some 30 minutes, most of them compiling
    python -m scripts.gpu_check --only kernels eager
    python -m scripts.gpu_check --model DIR          # besides, DIR against stock vLLM's AR
    python -m scripts.gpu_check --toy                # a rehearsal on a CPU, kernels interpreted
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.gpu_check.result import Result, Skip
from scripts.gpu_check.stages import ROOT, STAGES, Options


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--toy", action="store_true", help="on a CPU, in Triton's interpreter")
    parser.add_argument("--model", type=Path, help="a checkpoint to compare with stock vLLM's AR")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    options = Options(given.toy, given.model)
    if given.stage is not None:
        given.out.write_text(json.dumps(run_here(given.stage, options).as_json()))
        return 0
    results = {name: run_apart(name, options) for name in given.only}
    given.out.write_text(json.dumps({n: r.as_json() for n, r in results.items()}, indent=1) + "\n")
    width = max(map(len, results))
    print(f"\n{'stage':{width}}  status   detail")
    for name, result in results.items():
        print(f"{name:{width}}  {result.status:7}  {result.detail}")
    return int(any(result.status in ("wrong", "failed") for result in results.values()))


def run_here(name: str, options: Options) -> Result:
    """A stage, in this process."""
    try:
        return STAGES[name].run(options)
    except Skip as reason:
        return Result("skipped", str(reason))


def run_apart(name: str, options: Options) -> Result:
    """A stage in a process group of its own, all of which ends with it or at its limit."""
    stage = STAGES[name]
    print(f"== {name}: {stage.run.__doc__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [sys.executable, "-m", "scripts.gpu_check", "--stage", name, "--out", str(out)]
        command += ["--toy"] if options.toy else []
        command += ["--model", str(options.model)] if options.model is not None else []
        environment = (
            os.environ | stage.environment | ({"TRITON_INTERPRET": "1"} if options.toy else {})
        )
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            status = process.wait(stage.limit_s)
            why = f"exit status {status}"
        except subprocess.TimeoutExpired:
            why = f"took longer than {stage.limit_s} s"
        end_group(process)
        seconds = round(time.monotonic() - began, 1)
        read = json.loads(out.read_text()) if out.exists() else Result("failed", why).as_json()
    read["figures"]["seconds"] = seconds
    return Result(**read)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what a stage has left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
