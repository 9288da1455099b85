# SPDX-License-Identifier: Apache-2.0
"""Loss curves and accuracy against tokens per forward, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def loss_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses by step, with the block length, of a Trainer's ``log_history``."""
    figure, left = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = {"masked_loss": "masked", "ar_loss": "AR", "certainty_loss": "entropy of right guesses"}
    for name, label in names.items():
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            left.plot(*zip(*points, strict=True), label=label)
    left.set(xlabel="optimizer step", ylabel="loss in nats", yscale="log")
    left.legend(loc="upper right")
    right = left.twinx()
    lengths = [(e["step"], e["block_length"]) for e in history if "block_length" in e]
    right.step(*zip(*lengths, strict=True), where="post", color="0.7", linestyle=":")
    right.set(ylabel="block length (dotted)", ylim=(0, None))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def threshold_curves(rows: Sequence[dict[str, Any]], ar_exact: float | None, path: Path) -> None:
    """Exact answers against tokens per forward: a line for each number of sub-blocks.

    ``rows`` have ``small_blocks``, ``threshold``, ``exact`` (percent) and ``tpf``.
    """
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if ar_exact is not None:
        axes.axhline(ar_exact, color="0.6", linestyle="--", label="AR")
    for small in sorted({row["small_blocks"] for row in rows}, reverse=True):
        line = [row for row in rows if row["small_blocks"] == small]
        label = f"{small} sub-block{'s' if small > 1 else ''}"
        axes.plot([r["tpf"] for r in line], [r["exact"] for r in line], marker="o", label=label)
        for row in line:
            axes.annotate(f"{row['threshold']:g}", (row["tpf"], row["exact"]), fontsize=7)
    axes.set(xlabel="tokens per forward (points: thresholds)", ylabel="exact answers in %")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
