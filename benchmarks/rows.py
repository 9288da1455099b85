# SPDX-License-Identifier: Apache-2.0
"""Time of a forward of the 125m model by its rows, in bfloat16 and float32: what bounds the ratios.

    python -m benchmarks.rows --save cpu-rows

`gflops` counts the products with weights; `rows` of 0 is a single large product on the same core,
which no forward can exceed.

A mode that spends r rows a forward for t tokens can at best decode t * time(1) / time(r) times as
fast as AR. Without attention, which is small at these lengths.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from benchmarks.engines import OURS, Engine
from benchmarks.random_model import VOCAB_SIZE, build
from benchmarks.report import save

# Weights that a row is multiplied with: all but the embedding.
WEIGHTS = 12 * (4 * 768 * 768 + 3 * 768 * 1792) + 768 * VOCAB_SIZE
ROWS = (1, 4, 8, 16, 32, 64, 128, 256)


def make_result(dtype: str, rows: int, seconds: float, flop: float) -> dict[str, object]:
    """One line of the result, printed at once."""
    result = {"dtype": dtype, "rows": rows, "ms": round(1e3 * seconds, 2)}
    result |= {"ms_per_row": round(1e3 * seconds / max(rows, 1), 3)}
    result |= {"gflops": round(flop / seconds / 1e9, 1)}
    print(json.dumps(result), flush=True)
    return result


def measure(engine: Engine, dtype: str) -> Iterator[dict[str, object]]:
    """The lines of one dtype."""
    for rows in ROWS:
        (seconds,) = engine.llm.collective_rpc("time_rows", args=(rows,))
        yield make_result(dtype, rows, seconds, 2.0 * WEIGHTS * rows)
    ((seconds, flop),) = engine.llm.collective_rpc("time_matmul", args=(1024,))
    yield make_result(dtype, 0, seconds, flop)


def main() -> None:
    """Print a JSON object a line; save them when asked to."""
    parser = argparse.ArgumentParser(description="Forward time by rows.")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json too")
    options = parser.parse_args()
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="nbdiff-125m-") as name:
        build(Path(name))
        for dtype in ("bfloat16", "float32"):
            with closing(Engine(OURS, Path(name), dtype)) as engine:
                results += measure(engine, dtype)
    if options.save:
        save(options.save, results, {}, "benchmarks.rows")


if __name__ == "__main__":
    main()
