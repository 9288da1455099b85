# SPDX-License-Identifier: Apache-2.0
"""What a draft-only adapter of the bundled model is worth, and what of its training helps.

    python -m benchmarks.draft_only --save draft-only

Adapters are trained with one thing changed and asked in mode `verify` on 200 development problems;
the last one, trained for longer, on the held-out ones, beside the checkpoint alone. Text and exact
answers are the checkpoint's every time, so that what counts is tokens a forward. A finished adapter
is kept in the work folder and not trained again. Prints a JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.nano import CHECKPOINT
from benchmarks.report import save
from vllm_nbdiff.adapt import problems
from vllm_nbdiff.adapt.evaluate import Question, bundled_task, engine, from_file, score

ROOT = Path(__file__).parent.parent
TALKS, DEVELOPMENT, HELD_OUT = 20_000, 200, 300
SEEDS = {"talks": 7, "development": 12_345}
COLUMNS, MAX_TOKENS = 16, 256
STEPS, LONG = 800, 2400
ACCEPTANCE = ("--weighting", "acceptance")
VARIANTS: dict[str, tuple[str, ...]] = {
    "noise of adaptation": (),
    "noise of adaptation, acceptance": ACCEPTANCE,
    "drafts 0.7": ("--draft-share", "0.7"),
    "drafts 0.7, acceptance": ("--draft-share", "0.7", *ACCEPTANCE),
    "drafts 1, acceptance": ("--draft-share", "1", *ACCEPTANCE),
}
CHOSEN = "drafts 1, acceptance"


def write_talks(path: Path, seed: int, count: int) -> Path:
    """Problems and their answers as conversations, unless they are there."""
    if not path.exists():
        lines = []
        for problem in islice(problems.training(seed), count):
            question = {"role": "user", "content": problem.prompt}
            answer = {"role": "assistant", "content": problem.answer}
            lines.append(json.dumps({"messages": [question, answer]}))
        path.write_text("\n".join(lines) + "\n")
    return path


def train(work: Path, name: str, more: tuple[str, ...], steps: int) -> Path:
    """The folder of an adapter, trained if it is not there."""
    out = work / name.replace(", ", "-").replace(" ", "-")
    if (out / "adapter_model.safetensors").exists():
        return out
    options = {
        "model": CHECKPOINT,
        "data": work / "talks.jsonl",
        "eval-data": work / "development.jsonl",
        "out": out,
        "block-length": COLUMNS,
        "growth-initial": COLUMNS,
        "batch-tokens": 1536,
        "max-steps": steps,
        "learning-rate": 2e-3,
        "adam-beta2": 0.98,
        "save-strategy": "no",
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "vllm_nbdiff.adapt", "--lora", "--draft-only", *words, *more]
    subprocess.run([*command, "--skip-engine", "--use-cpu"], check=True)
    return out


def asked(
    name: str, questions: list[Question], adapter: Path | None, break_points: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """A line for each number of break points."""
    llm = engine(CHECKPOINT, "NBDiffForCausalLM", adapter)
    for fan_out in break_points:
        extra = {
            "nbdiff_mode": "verify",
            "nbdiff_draft_length": COLUMNS,
            "nbdiff_fan_out": fan_out,
        }
        exact, tokens = score(llm, questions, MAX_TOKENS, extra, adapter)
        yield {
            "adapter": name,
            "problems": len(questions),
            "break_points": fan_out,
            "exact": round(exact, 1),
            "tokens_per_forward": round(tokens, 3),
        }


def main() -> None:
    """Train what is missing, ask, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "draft-only")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--long", type=int, default=LONG, help="steps of the last one")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json too")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write_talks(options.work / "talks.jsonl", SEEDS["talks"], TALKS)
    file = write_talks(options.work / "development.jsonl", SEEDS["development"], DEVELOPMENT)
    development, held_out = from_file(file, DEVELOPMENT), bundled_task(HELD_OUT)
    results: list[dict[str, Any]] = []

    def add(rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            results.append(row)
            print(json.dumps(row), flush=True)

    add(asked("none", development, None, (0,)))
    for name, more in VARIANTS.items():
        adapter = train(options.work, name, more, options.steps)
        add(asked(name, development, adapter, (0,)))
    best = train(options.work, f"long {CHOSEN}", VARIANTS[CHOSEN], options.long)
    add(asked("none", held_out, None, (0, 2)))
    add(asked(f"{CHOSEN}, {options.long} steps", held_out, best, (0, 2)))
    if options.save:
        settings = {"steps": options.steps, "long": options.long, "columns": COLUMNS}
        save(options.save, results, settings, "benchmarks.draft_only")


if __name__ == "__main__":
    main()
