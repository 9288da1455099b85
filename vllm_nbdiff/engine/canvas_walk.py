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
    """Change what is proposed for one request: its canvas, tokens, and what is taken, of `own`
    [5, L], which also says whether the step is its canvas's last, and what has a chance.

    Returns:
        Whether the request can go on: something fits in the first masked column.
    """
    canvas, token, taken, is_last, is_likely = own
    if not one.thinks:
        taken[one.column] = 1
    for column in range(one.column, len(canvas)):
        fresh = bool(taken[column])
        if not fresh and canvas[column] == mask:
            return True
        # What has no chance stands for no token, and may be one that the grammar has.
        drawn = not fresh or bool(is_likely[column])
        if drawn and one.matcher.accepts(int((token if fresh else canvas)[column])):
            continue
        must_fit = column == one.column and not one.thinks
        if must_fit and not one.drafts:
            return False
        other = None
        if fresh and is_last[column] and not must_fit:
            other = draw_again(one.rows[column], torch.from_numpy(one.matcher.allowed()))
        if other is None or not one.matcher.accepts(other):
            # A draft's text finds out when it is verified.
            taken[column], canvas[column] = 0, mask
            return True
        token[column] = other
    return True
