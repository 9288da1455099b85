# SPDX-License-Identifier: Apache-2.0
"""What of a canvas that a step has filled a grammar lets stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_nbdiff.engine.matcher import Matcher

DrawAgain = Callable[[int, Tensor], int | None]
"""The best token of a row of the last draw under a bitmask [1, W]; None: there is none."""


class Opened(NamedTuple):
    """A canvas that has masked columns, the first of which is drawn under its mask."""

    slot: int
    matcher: Matcher  # before that column
    column: int
    rows: dict[int, int]  # of logits, by column
    thinks: bool  # that column has no mask yet: it need not be filled
    drafts: bool  # nor need that of a draft, which is verified


def walk_canvas(one: Opened, own: np.ndarray, mask: int, draw_again: DrawAgain) -> bool:
    """Change what is proposed for one request: its canvas, tokens, what is taken, and, the last
    one, behind which column nothing fits, of `own` [6, L], which also says whether the step is its
    canvas's last, and what has a chance. Returns whether the request can go on."""
    canvas, token, taken, is_last, is_likely, lost = own
    if not one.thinks:
        taken[one.column] = 1
    for column in range(one.column, len(canvas)):
        fresh = bool(taken[column])
        if not fresh and canvas[column] == mask:
            return True
        fits = one.matcher.accepts(int((token if fresh else canvas)[column]))
        must_fit = column == one.column and not one.thinks
        if must_fit and not (fits and is_likely[column]):
            if one.drafts:  # what verifies the text before it will find out
                taken[column:], canvas[column] = 0, mask
                return True
            lost[:column] = np.arange(column) == column - 1
            return False
        if fits:
            continue
        other = None
        if fresh and is_last[column]:
            other = draw_again(one.rows[column], torch.from_numpy(one.matcher.allowed()))
        if other is None or not one.matcher.accepts(other):
            taken[column], canvas[column] = 0, mask
            return True
        token[column] = other
    return True
