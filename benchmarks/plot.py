# SPDX-License-Identifier: Apache-2.0
"""Plot saved results: tokens a second over AR by requests in flight, a panel a model; models with
one number of requests are left out.

python -m benchmarks.plot benchmarks/results/cpu-{nano,125m}.json --out benchmarks/results/cpu.png
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(rows: list[dict[str, object]], out: Path) -> None:
    """Write the figure for rows of `benchmarks.report.Row`."""
    cells = dict.fromkeys((str(row["model"]), row["batch"]) for row in rows)
    counts = Counter(model for model, _ in cells)
    models = [model for model in counts if counts[model] > 1]
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for mode in dict.fromkeys(str(row["mode"]) for row in rows):
            points = [(r["batch"], r["ratio_to_ar"]) for r in rows if r["model"] == model
                      and r["mode"] == mode]  # fmt: skip
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=mode)
        axis.set(title=model, xlabel="requests in flight", xscale="log", ylim=(0, None))
        batches = sorted({row["batch"] for row in rows if row["model"] == model})  # type: ignore[type-var]
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("tokens/s over stock vLLM, AR")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description="Plot saved results.")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw([row for file in options.results for row in json.loads(file.read_text())["results"]],
         options.out)  # fmt: skip


if __name__ == "__main__":
    main()
