# SPDX-License-Identifier: Apache-2.0
"""Mode `auto` against every fixed width, over groups of requests on noisy machines made up."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from vllm_nbdiff.engine.chooser import NOTHING_MORE, DraftChooser, Verified
from vllm_nbdiff.engine.cost import CostModel

MACHINES: dict[str, Callable[[int], float]] = {
    "cheap rows": lambda rows: 6e-3 + 6e-6 * rows,
    "small model": lambda rows: 1.5e-3 + 1.6e-5 * rows,
    "large model": lambda rows: 40e-3 + 2e-3 * rows,
    "free, then dear rows": lambda rows: 6e-3 * max(1, rows / 300),
}
LOADS = (64, 16, 4, 1)
WIDTHS = (1, 8, 16, 32)
HOLDS = 0.965  # chance of a drafted column, if all before it hold
BETWEEN, FIRST = 2.5e-3, 1.8e-3  # seconds between schedules, and of a first forward beside its rows
MOST_SECONDS, MOST_FORWARDS, ROOM = 0.1, 16, 64


class Machine:
    """A clock, and requests that decode by it."""

    def __init__(self, seconds: Callable[[int], float], seed: int, width: int | None) -> None:
        """Args: seconds: of a forward by its rows; width: of drafts, None: that of `auto`."""
        self.seconds, self.width, self.random = seconds, width, np.random.default_rng(seed)
        self.chooser = DraftChooser(CostModel(), 32, MOST_FORWARDS, MOST_SECONDS)

    def forward(self, rows: int) -> float:
        """Seconds of one: a few are held up."""
        late = self.random.uniform(2, 3.5) if self.random.random() < 0.07 else 1.0
        return self.seconds(rows) * float(self.random.lognormal(0, 0.12)) * late

    def group(self, requests: int) -> float:
        """Seconds of so many requests that begin together."""
        left = self.random.integers(30, 90, requests)
        drafted = np.zeros(requests, np.bool_)
        total = 0.0
        while (left > 0).any():
            width = self.width or self.chooser.choose(int((left > 0).sum()), 0)
            seconds, drafted = self.schedule(width, left, drafted if width > 1 else drafted & False)
            total += seconds
        return total

    def schedule(
        self, width: int, left: np.ndarray, drafted: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Seconds of a schedule, which takes what it gives from `left`, tokens that requests want;
        which of them have a draft then."""
        before, forwards, seen = left.copy(), [], []
        while len(forwards) < MOST_FORWARDS and sum(own for _, own in forwards) < MOST_SECONDS:
            going = left > 0
            wrong = self.random.random((len(left), width)) >= HOLDS
            held = np.minimum(np.where(wrong.any(1), wrong.argmax(1) + 1, width), width)
            given = np.where(drafted, held, 1) if width > 1 else np.ones(len(left), np.int64)
            seen += [(width, width, n, 0, width, 1) for n in held[going & drafted].tolist()]
            rows = int(going.sum()) * width
            forwards.append((rows, self.forward(rows) + (0.0 if forwards else FIRST)))
            left -= np.where(going, given, 0)
            drafted = going & ~drafted & (width > 1)
            full = (before - left).max() + width > ROOM
            if full or (going & (left <= 0)).any():
                break
        seconds = sum(own for _, own in forwards) + BETWEEN
        if seen:
            limits = np.repeat(np.array([NOTHING_MORE]).T, len(seen), axis=1)
            self.chooser.observe(Verified(*np.array(seen).T, *limits))
        ended = int(((before > 0) & (left <= 0)).sum())
        self.chooser.observe_ends(int((before - np.maximum(left, 0)).sum()), ended)
        self.chooser.observe_schedule(forwards, seconds)
        return seconds, drafted


def loads(seconds: Callable[[int], float], seed: int, width: int | None) -> list[float]:
    """Seconds of a few groups of every load, one after the other on one machine."""
    machine = Machine(seconds, seed, width)
    machine.group(4)
    return [sum(machine.group(load) for _ in range(max(128 // load, 3))) for load in LOADS]


@cache
def fixed(machine: str) -> np.ndarray:
    """[widths, loads] seconds."""
    return np.array([loads(MACHINES[machine], 0, width) for width in WIDTHS])


@pytest.mark.parametrize("machine", MACHINES)
def test_auto_is_nearly_as_fast_as_the_best_width(machine: str) -> None:
    """From the first group on, whose costs nobody knows."""
    spent = np.mean([loads(MACHINES[machine], seed, None) for seed in range(3)], axis=0)
    share = fixed(machine).min(0) / spent
    found = dict(zip(LOADS, share.round(2).tolist(), strict=True))
    assert share.min() > 0.8 and np.minimum(share, 1).mean() > 0.92, found


def test_no_width_is_the_best_of_every_machine_and_load() -> None:
    best = {WIDTHS[place] for machine in MACHINES for place in fixed(machine).argmin(0)}
    assert best == set(WIDTHS)
