# SPDX-License-Identifier: Apache-2.0
"""What drafts are worth: tokens and rows a forward, and tokens a second, by their columns and the
break points for which they are made.

    python -m benchmarks.drafts --problems 300 --batches 1 --temperatures 0 1 --rounds 1
    python -m benchmarks.drafts --models nano 125m --save cpu-drafts
    python -m benchmarks.drafts --plot benchmarks/results/cpu-drafts.json

Every choice decodes the same requests, in turns, on one engine of ours, in mode `verify`. As many
columns are verified and canvases held as stated, whatever they cost; `adaptive` lets the engine
choose among them, `ar` is its own AR decoding. Of `125m`, whose text is random, a drafted token is
right by a fixed chance. Prints a JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from benchmarks.engines import OURS, Engine, Request
from benchmarks.nano import CHECKPOINT, Nano
from benchmarks.random_model import Random125M, StepMix, build, find_chance, native_dtype
from benchmarks.report import RESULTS, save
from vllm_nbdiff.adapt.problems import is_exact

# Of a drafted token of 125m: with 16 columns as many hold as on nano in two forwards.
CHANCE = find_chance(2 * 6.75 - 1, 16)
# Columns of a draft, break points.
CHOICES = ((8, 0), (8, 2), (8, 7), (16, 0), (16, 1), (16, 2), (16, 4), (16, 15), (32, 0), (32, 1),
           (32, 4))  # fmt: skip


class Choice(NamedTuple):
    """What of a request's drafts is asked for."""

    name: str
    columns: int
    break_points: int

    @property
    def options(self) -> dict[str, Any]:
        """Of a request."""
        if self.name == "ar":
            return {"nbdiff_mode": "ar"}
        return {
            "nbdiff_mode": "verify",
            "nbdiff_draft_length": self.columns,
            "nbdiff_fan_out": self.break_points,
        }


class Measured(NamedTuple):
    """One round."""

    seconds: float
    texts: list[list[int]]
    forwards: int  # summed over requests
    rows: int
    exact: int


class Drafts:
    """One engine, and the requests of every round."""

    def __init__(self, workload: Nano | Random125M, engine: Engine) -> None:
        self.workload = workload
        self.engine = engine

    def requests(self, choice: Choice, batch: int, temperature: float) -> list[Request]:
        """The same prompts for every choice."""
        found = self.workload.requests("verify", batch, 1)
        for index, request in enumerate(found):
            request.params.temperature = temperature
            request.params.seed = index if temperature else None
            request.params.extra_args = choice.options
        return found

    def run(self, choice: Choice, batch: int, temperature: float) -> Measured:
        """Answer all requests, `batch` at a time."""
        self.engine.llm.collective_rpc("set_adaptive", args=(choice.name == "adaptive",))
        requests, texts, exact = self.requests(choice, batch, temperature), [], 0
        forwards, rows = self._counted()
        start = perf_counter()
        for first in range(0, len(requests), batch):
            group = requests[first : first + batch]
            prompts: list[Any] = [{"prompt_token_ids": one.prompt} for one in group]
            params = [one.params for one in group]
            for one, output in zip(
                group, self.engine.llm.generate(prompts, params, use_tqdm=False), strict=True
            ):
                texts.append(list(output.outputs[0].token_ids))
                if one.problem is not None:
                    exact += is_exact(one.problem, output.outputs[0].text)
        seconds = perf_counter() - start
        after = self._counted()
        return Measured(seconds, texts, after[0] - forwards, after[1] - rows, exact)

    def _counted(self) -> tuple[int, int]:
        values = {"vllm:diffusion_num_denoising_steps": 0, "vllm:diffusion_num_rows": 0}
        for metric in self.engine.llm.get_metrics():
            if metric.name in values:
                values[metric.name] += int(metric.value)
        steps, rows = values.values()
        return steps, rows

    def measure(
        self, choices: list[Choice], batch: int, temperature: float, rounds: int
    ) -> Iterator[dict[str, Any]]:
        """A line a choice; a first round only warms up."""
        samples: dict[Choice, list[Measured]] = {choice: [] for choice in choices}
        for turn in range(rounds + 1):
            for choice in choices if turn % 2 else reversed(choices):
                sample = self.run(choice, batch, temperature)
                if turn or not rounds:
                    samples[choice].append(sample)
        expected = samples[choices[0]][0].texts
        for choice, own in samples.items():
            tokens = sum(len(text) for text in own[0].texts)
            yield {
                "model": self.workload.name,
                "requests": batch,
                "temperature": temperature,
                "choice": choice.name,
                "columns": choice.columns,
                "break_points": choice.break_points,
                "tokens_per_forward": round(tokens / own[0].forwards, 3),
                "rows_per_forward": round(batch * own[0].rows / own[0].forwards, 1),
                "tokens_per_s": round(tokens / median(one.seconds for one in own), 1),
                "exact": round(100 * own[0].exact / len(own[0].texts), 1),
                "text_of_ar": own[0].texts == expected,
            }


def choices_of(asked: list[str]) -> list[Choice]:
    """`ar` and what was asked for, `COLUMNS:BREAK_POINTS` each."""
    pairs = [tuple(map(int, one.split(":"))) for one in asked] or list(CHOICES)
    fixed = [Choice("fixed", *pair) for pair in pairs]
    return [Choice("ar", 1, 0), *fixed, Choice("adaptive", 16, 4)]


def draw(file: Path) -> None:
    """Plot tokens a second over rows a forward, a panel a model, beside the saved `file`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in json.loads(file.read_text())["results"] if not row["temperature"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for batch in dict.fromkeys(row["requests"] for row in rows if row["model"] == model):
            own = [row for row in rows if (row["model"], row["requests"]) == (model, batch)]
            (base,) = (row["tokens_per_s"] for row in own if row["choice"] == "ar")
            points = sorted((row["rows_per_forward"], row["tokens_per_s"] / base) for row in own)
            axis.plot(*zip(*points, strict=True), marker="o", label=batch)
            for row in own:
                place = row["rows_per_forward"], row["tokens_per_s"] / base
                pair = f"{row['columns']}:{row['break_points']}"
                axis.annotate(row["choice"].replace("fixed", pair), place, fontsize=6)
        axis.set(title=model, xlabel="rows a forward", xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("tokens/s over the same engine's AR")
    axes[0][-1].legend(title="requests")
    figure.tight_layout()
    figure.savefig(file.with_suffix(".png"), dpi=120)


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("nano", "125m"), default=["nano"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0])
    parser.add_argument("--choices", nargs="+", metavar="COLUMNS:BREAK_POINTS", default=[])
    parser.add_argument("--problems", type=int, default=32, help="of nano a round, default 32")
    parser.add_argument("--rounds", type=int, default=3, help="0: counts are all that is wanted")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="only draw what was saved")
    options = parser.parse_args()
    if options.plot:
        draw(options.plot)
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="nbdiff-125m-") as name:
        for model in options.models:
            workload: Nano | Random125M = Nano(CHECKPOINT, options.problems)
            if model == "125m":
                build(Path(name))
                workload = Random125M(Path(name), native_dtype(), StepMix(1, 0.0), 4, 64)
            with closing(Engine(OURS, workload.folder, workload.dtype)) as engine:
                if model == "125m":
                    engine.force_acceptance(CHANCE)
                drafts, choices = Drafts(workload, engine), choices_of(options.choices)
                for temperature in options.temperatures:
                    for batch in options.batches:
                        for row in drafts.measure(choices, batch, temperature, options.rounds):
                            print(json.dumps(row), flush=True)
                            results.append(row)
    if options.save:
        settings = {"problems": options.problems, "rounds": options.rounds, "chance_125m": CHANCE}
        save(options.save, results, settings, "benchmarks.drafts")
        draw(RESULTS / f"{options.save}.json")


if __name__ == "__main__":
    main()
