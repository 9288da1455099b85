# SPDX-License-Identifier: Apache-2.0
"""Block diffusion against stock vLLM decoding the same weights autoregressively, side by side.

    python -m benchmarks                # everything; make bench
    python -m benchmarks --quick        # does it run?

Progress goes to stderr, the result to stdout: one JSON object a line (see benchmarks/README.md).
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from time import perf_counter, sleep

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.budget import Budget
from benchmarks.engines import (
    AR,
    DIFFUSION,
    FREEDAVE,
    MODES,
    OURS,
    REAL_MODES,
    STOCK,
    TWO_FORWARDS,
    VERIFY,
    Engine,
    Sample,
)
from benchmarks.nano import CHECKPOINT, Nano, NanoJson
from benchmarks.random_model import (
    Random125M,
    StepMix,
    build,
    find_chance,
    find_step_mix,
    native_dtype,
)
from benchmarks.report import Row, make_row, save
from vllm_nbdiff.request_options import DEFAULT_DRAFT_LENGTH

MODELS = ("nano", "125m")
BATCHES = (1, 4, 16, 64)
JSON_BATCHES, JSON_PROBLEMS = (1,), 8
# An idle worker of vLLM spins for a second after its last step.
SETTLE_SECONDS = 1.2
WARM_UP_REQUESTS = 4


class Run:
    """One run of the benchmark: its options, its progress bar and the rows so far."""

    def __init__(self, options: argparse.Namespace, console: Console, progress: Progress) -> None:
        self.options = options
        self.console = console
        self.progress = progress
        self.rows: list[Row] = []
        cells = len(options.models) * len(options.batches)
        json_cells = len(JSON_BATCHES) if "nano" in options.models else 0
        # FreeDave takes no grammar.
        self.json_modes = [mode for mode in options.modes if mode != FREEDAVE]
        self.budget = Budget(60 * options.minutes, cells + json_cells)
        total = len(options.modes) * cells + len(self.json_modes) * json_cells
        self.bar = progress.add_task("start", total=total * (options.rounds + 1))

    def nano(self) -> dict[str, float]:
        """Measure the bundled checkpoint; returns tokens per forward by mode."""
        workload = Nano(self.options.nano, 8 if self.options.quick else 64)
        self.console.print(f"nano: {workload.folder}, {workload.dtype}")
        with self.engines(workload.folder, workload.dtype) as engines:
            self.measure(workload, engines)
            reached = {
                mode: mean(row.tpf for row in self.rows if row.mode == mode)
                for mode in self.options.modes
            }
            workload = NanoJson(self.options.nano, JSON_PROBLEMS)
            self.measure(workload, engines, self.json_modes, JSON_BATCHES)
        return reached

    def random_125m(self, tpf: float, verify_tpf: float) -> StepMix:
        """Measure the random model at these tokens per forward; returns the mix of steps."""
        with tempfile.TemporaryDirectory(prefix="nbdiff-125m-") as name:
            folder = Path(name)
            self.progress.update(self.bar, description="125m: build")
            build(folder)
            with self.engines(folder, self.options.dtype) as engines:
                workload = self.forced(folder, engines[DIFFUSION], tpf)
                # Of two forwards the one that makes the draft gives a token.
                chance = find_chance(2 * verify_tpf - 1, DEFAULT_DRAFT_LENGTH)
                engines[VERIFY].force_acceptance(chance)
                self.console.print(
                    f"125m: {workload.dtype}, {workload.mix} for {tpf:.2f} tokens per forward",
                    soft_wrap=True,
                )
                self.measure(workload, engines)
        return workload.mix

    def forced(self, folder: Path, engine: Engine, tpf: float) -> Random125M:
        """The random model's workload with `tpf` tokens per forward, found by trying."""
        quick, dtype = self.options.quick, self.options.dtype
        tokens = 32 if quick else 64
        probe = Random125M(folder, dtype, StepMix(1, 0.0), 1, tokens)

        def measure(steps: int) -> float:
            sample = engine.run([probe.request(random.Random(steps), DIFFUSION, steps)], 1)
            return sample.tokens / sample.forwards

        return Random125M(folder, dtype, find_step_mix(tpf, measure), 2 if quick else 4, tokens)

    @contextmanager
    def engines(self, folder: Path, dtype: str) -> Iterator[dict[str, Engine]]:
        """The engine of every mode, two on the same weights, alive side by side."""
        self.progress.update(self.bar, description="start both engines")
        with (
            closing(Engine(OURS, folder, dtype)) as ours,
            closing(Engine(STOCK, folder, dtype)) as stock,
        ):
            yield {**dict.fromkeys(self.options.modes, ours), AR: stock}

    def measure(
        self,
        workload: Nano | Random125M,
        engines: dict[str, Engine],
        modes: Sequence[str] | None = None,
        batches: Sequence[int] | None = None,
    ) -> None:
        """Every mode and batch size of the run, or these: a short warm-up, then the rounds.

        The engines take turns. The largest batch first: where a single round takes more than its
        share of the time, the others have fewer rounds.
        """
        modes, rounds = modes or self.options.modes, self.options.rounds
        for batch in sorted(batches or self.options.batches, reverse=True):
            self.budget.begin_part()
            samples: dict[str, list[Sample]] = {mode: [] for mode in modes}
            self.round(workload, engines, modes, batch, 0)
            done, seconds = 0, 0.0
            while not done or (done < rounds and self.budget.has(seconds)):
                done += 1
                start = perf_counter()
                for mode, sample in self.round(workload, engines, modes, batch, done).items():
                    samples[mode].append(sample)
                seconds = perf_counter() - start
            self.progress.advance(self.bar, (rounds - done) * len(modes))
            for mode in modes:
                self.rows.append(make_row(workload.name, mode, batch, samples))
                self.console.print(json.dumps(asdict(self.rows[-1])), soft_wrap=True)

    def round(
        self,
        workload: Nano | Random125M,
        engines: dict[str, Engine],
        modes: Sequence[str],
        batch: int,
        index: int,
    ) -> dict[str, Sample]:
        """One round of every mode; the one of index 0 only warms up, with few requests."""
        samples: dict[str, Sample] = {}
        for mode in modes if index % 2 else reversed(modes):
            label = f"{workload.name}, batch {batch}, {mode}"
            self.progress.update(self.bar, description=label)
            requests = workload.requests(mode, batch, index)
            if index == 0:
                requests = requests[: min(batch, WARM_UP_REQUESTS)]
            samples[mode] = engines[mode].run(requests, batch)
            self.progress.advance(self.bar)
            sleep(SETTLE_SECONDS)
        return samples


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    choices = (*MODES, *REAL_MODES)
    parser.add_argument(
        "--modes", nargs="+", choices=choices, default=MODES, help="ar, diffusion, verify needed"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--rounds", type=int, default=3, help="most measured rounds, default 3")
    parser.add_argument(
        "--minutes",
        type=float,
        default=24,
        help="more rounds than one only where they end within it, default 24",
    )
    parser.add_argument("--quick", action="store_true", help="smoke run: batch 1 and 4, one round")
    parser.add_argument("--nano", type=Path, default=CHECKPOINT, help="checkpoint of model nano")
    parser.add_argument("--tpf", type=float, help="force 125m to it; default: what nano reaches")
    parser.add_argument("--verify-tpf", type=float, help="the same for two_forwards")
    parser.add_argument("--dtype", help="of 125m; default: bfloat16 where the CPU has it, float32")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json too")
    options = parser.parse_args()
    if "nano" not in options.models and None in (options.tpf, options.verify_tpf):
        parser.error("--models without nano needs --tpf and --verify-tpf")
    if "125m" in options.models and set(REAL_MODES) & set(options.modes):
        parser.error(f"--modes {' '.join(REAL_MODES)} need --models nano: text of 125m is forced")
    needed = {AR, DIFFUSION, VERIFY}
    if options.verify_tpf is None and "125m" in options.models:
        needed.add(TWO_FORWARDS)
    if needed - set(options.modes):
        parser.error(f"--modes needs {', '.join(sorted(needed))}")
    if options.quick:
        options.batches, options.rounds = (1, 4), 1
    options.dtype = options.dtype or native_dtype()
    return options


def main() -> None:
    """Run, print the rows as JSON lines, save them when asked to."""
    options = parse_arguments()
    warnings.simplefilter("ignore")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    mix = None
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        run = Run(options, console, progress)
        reached = run.nano() if "nano" in options.models else {}
        if "125m" in options.models:
            mix = run.random_125m(
                options.tpf or reached[DIFFUSION], options.verify_tpf or reached[TWO_FORWARDS]
            )
    rows = [asdict(row) for row in run.rows]
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.save:
        settings = {"rounds": options.rounds, "dtype_125m": options.dtype}
        settings["steps_125m"] = asdict(mix) if mix is not None else None
        save(options.save, rows, settings)


if __name__ == "__main__":
    main()
