# SPDX-License-Identifier: Apache-2.0
"""Choosers of mode `auto` that have seen clocks and acceptances made up."""

from collections.abc import Callable

import numpy as np

from vllm_nbdiff.engine.chooser import NOTHING_MORE, DraftChooser, Limits, Verified
from vllm_nbdiff.engine.cost import CostModel


def chooser(seconds_of_row: float) -> DraftChooser:
    """One that has seen some forwards of each kind, which take 1 ms and so much more a row."""
    cost = CostModel()
    for rows in 20 * (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        cost.observe(rows, 1e-3 + seconds_of_row * rows)
    return DraftChooser(cost, max_width=32, max_forwards=16)


def seen(
    width: int,
    text: int,
    held: int,
    hit: int,
    rows: int,
    drafts: int = 0,
    limits: Limits = NOTHING_MORE,
) -> Verified:
    """One text."""
    numbers = np.array([[width], [text], [held], [hit], [rows], [drafts]])
    return Verified(*numbers, *np.array([[limits.chance], [limits.survival]]))


def drafted(random: np.random.Generator, requests: int, width: int, chance: float) -> Verified:
    """Texts of so many requests whose drafted tokens are right with this chance."""
    wrong = random.random((requests, width - 1)) >= chance
    held = np.where(wrong.any(1), wrong.argmax(1) + 1, width)
    whole, nothing = np.full(requests, width), np.zeros(requests, np.int64)
    limits = np.full((2, requests), NOTHING_MORE[0]) * [[1], [0]]
    return Verified(whole, whole, held, nothing, whole, nothing, *limits)


def learn(
    chosen: DraftChooser,
    requests: int,
    chance: float,
    seconds: Callable[[int], float] | None,
    choices: int,
) -> list[int]:
    """Widths chosen while drafted tokens are right with this chance and forwards take `seconds` by
    their rows; None: what they take is not seen."""
    random = np.random.default_rng(0)
    widths = []
    for _ in range(choices):
        width = chosen.choose(requests, other_rows=0)
        widths.append(width)
        if width > 1:
            chosen.observe(drafted(random, requests, width, chance))
        if seconds is not None:
            chosen.cost.observe(requests * width, seconds(requests * width))
    return widths


def serve(chosen: DraftChooser, chance: float, requests: int, drafts: int = 400) -> list[int]:
    """The later half of the widths chosen while drafted tokens are right with this chance."""
    return learn(chosen, requests, chance, None, drafts)[drafts // 2 :]


def most_common(widths: list[int]) -> int:
    return max(set(widths), key=widths.count)
