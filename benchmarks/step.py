# SPDX-License-Identifier: Apache-2.0
"""Times one denoise step of an NBDiff-7B-shaped model with random weights under a CUDA graph,
against the time its weights and KV take at the copy bandwidth measured in the same run.

    python -m benchmarks.step                # on a CUDA GPU
    python -m benchmarks.step --layers 8     # a shallower model, when memory or time is short
    python -m benchmarks.step --toy          # on any CPU: the same code on toy shapes, in Triton's
                                             # interpreter; its times mean nothing

A step is its plan, the forward of 32 rows per request, logits of 8 of them, their statistics and
what follows from them. The first one is checked against plain PyTorch before anything is timed.
Columns are tab-separated.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

if "--toy" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

from benchmarks.step_model import (
    NBDIFF_7B,
    TOY,
    ModelConfig,
    Step,
    Weights,
    bytes_to_move,
    random_batch,
    random_weights,
)
from benchmarks.step_reference import check
from benchmarks.timing import copy_bandwidth, describe, fits, measure_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the result; times in milliseconds."""

    requests: int
    context: int
    step_ms: float
    floor_ms: float
    gb: float
    over_floor: float


def time_step(
    config: ModelConfig, weights: Weights, requests: int, context: int, rate: float
) -> Row:
    """One row; `rate` is the copy bandwidth in bytes per second."""
    batch = random_batch(config, requests, context)
    seconds = measure_of(config.device)(Step(config, weights, batch))
    num_bytes = bytes_to_move(config, weights, batch)
    floor = num_bytes / rate
    return Row(requests, context, 1e3 * seconds, 1e3 * floor, num_bytes / 1e9, seconds / floor)


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--toy", action="store_true", help="toy shapes in the interpreter, on CPU")
    parser.add_argument("--layers", type=int, help="default 34; toy 2")
    parser.add_argument("--requests", type=int, nargs="+", help="default 1 8 32; toy 1 3")
    parser.add_argument("--contexts", type=int, nargs="+", help="default 512 to 32768; toy 0 45")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json too")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        parser.error("no CUDA GPU; --toy runs on CPU")
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be at least 1")
    return options


def main() -> None:
    options = options_of(argparse.ArgumentParser("python -m benchmarks.step", description=__doc__))
    config = TOY if options.toy else NBDIFF_7B
    config = dataclasses.replace(config, layers=options.layers or config.layers)
    requests = options.requests or ([1, 3] if options.toy else [1, 8, 32])
    contexts = options.contexts or ([0, 45] if options.toy else [512, 2048, 8192, 32768])

    torch.manual_seed(0)
    rate = copy_bandwidth(config.device)
    print(f"# {describe(config.device)}")
    weights = random_weights(config)
    gigabytes = weights.bytes_read() / 1e9
    print(f"# copy bandwidth {rate / 1e9:.0f} GB/s; {config.layers} layers, {gigabytes:.3f} GB")
    check(Step(config, weights, random_batch(config, requests[0], contexts[0])))

    rows = []
    print(*(field.name for field in dataclasses.fields(Row)), sep="\t")
    for count in requests:
        for context in contexts:
            if not fits(
                count * (context + config.block) * config.kv_bytes_per_token, config.device
            ):
                print(f"# {count} requests of {context} tokens do not fit in memory: skipped")
                continue
            row = time_step(config, weights, count, context, rate)
            rows.append(row)
            figures = f"{row.step_ms:.3f}\t{row.floor_ms:.3f}\t{row.gb:.3f}\t{row.over_floor:.3f}"
            print(f"{row.requests}\t{row.context}\t{figures}", flush=True)
    if options.save:
        keep(options.save, config, rate, rows)


def keep(name: str, config: ModelConfig, rate: float, rows: list[Row]) -> None:
    """Save the rows, with the model's shape and the copy bandwidth in bytes a second."""
    from benchmarks.report import save  # asks for vLLM's version, which takes a while

    settings = {"device": describe(config.device), "copy_gb_per_s": rate / 1e9}
    settings |= {key: str(value) for key, value in dataclasses.asdict(config).items()}
    results = [dataclasses.asdict(row) for row in rows]
    save(name, results, settings, "benchmarks.step")


if __name__ == "__main__":
    main()
