# SPDX-License-Identifier: Apache-2.0
"""Which rows of a forward need logits, and what they predict."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vllm_nbdiff.decoding.canvas import Options
from vllm_nbdiff.decoding.indices import indices
from vllm_nbdiff.decoding.segments import Canvases, Segments

if TYPE_CHECKING:
    from vllm_nbdiff.decoding.plan import Batch, Facts, Plan


class Rows(NamedTuple):
    """Rows of logits that a forward may need, [B, K] each.

    In this order: NEXT, what follows the columns of a text (the prompt's last row stands at the
    first of them); FILL, the columns of each canvas; GUESS, the next canvas's seed.
    """

    needed: Tensor  # bool
    offset: Tensor  # int64, row of the request's rows in the forward


def needed_rows(
    options: Options,
    batch: Batch,
    facts: Facts,
    segments: Segments,
    text: Tensor,
    canvases: Canvases,
) -> tuple[int, Rows]:
    """How many of the rows are NEXT, and the rows."""
    num_next, offsets, needs = 0, [], []
    if facts.texts:
        needed, column = _next_rows(options, batch, facts, text, canvases.tokens.shape[2])
        num_next, offsets, needs = column.shape[1], [column], [needed]
    if facts.looks:
        needed, offset = _canvas_rows(options, facts, segments, canvases)
        offsets.append(offset)
        needs.append(needed)
    if len(needs) == 1:
        return num_next, Rows(needs[0], offsets[0])
    return num_next, Rows(torch.cat(needs, 1), torch.cat(offsets, 1))


def _next_rows(
    options: Options, batch: Batch, facts: Facts, text: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Which rows that predict what follows a text are needed, and where they are, [B, N] each."""
    # Verification asks what follows each column, a commit and the end of a prompt the last one.
    columns = indices(length, text.device)
    if facts.verifies:
        column = columns.expand(len(text), length)
        asked = options.verifies[:, None] | (column == text[:, None] - 1)
        needed = (column < text[:, None]) & asked
    else:
        column = (text - 1)[:, None]
        needed = column >= 0
    if facts.family.seed == "never":
        needed = torch.zeros_like(needed)
    elif facts.prefills:
        ends = batch.prompt_ends[:, None] & (columns[: column.shape[1]] == 0)
        if facts.family.block_causal:
            # A prompt that ends inside a block has no seed after it.
            ends &= ((batch.computed + batch.scheduled) % length == 0)[:, None]
        needed = needed | ends
        column = torch.where(ends, batch.scheduled[:, None] - 1, column)
    return needed, column


def _canvas_rows(
    options: Options, facts: Facts, segments: Segments, canvases: Canvases
) -> tuple[Tensor, Tensor]:
    """The same of rows that predict the columns of canvases, and the next canvas's seed."""
    num_canvases, length = canvases.tokens.shape[1:]
    active = canvases.active
    columns = indices(length, active.device)
    if segments.length.shape[1] == 1:
        begins = -canvases.low
    else:
        begins = segments.length.cumsum(1) - segments.length
        begins = begins[:, -num_canvases:] - canvases.low
    # With a shift the row of column j - 1 predicts column j.
    offset = begins[:, :, None] + (columns - int(facts.family.shifts)).clamp(min=0)
    if not facts.guesses:
        return active.flatten(1), offset.flatten(1)
    # A seed is guessed where this step may fill the last masked position.
    width = canvases.width[:, :1]
    masked = (canvases.tokens[:, 0] == facts.mask_token_id) & (columns < width)
    guesses = canvases.exists[:, 0] & options.fuses & (active[:, 0] == masked).all(1)
    guesses &= canvases.high[:, 0] == width[:, 0]  # the last column is among the rows
    needed = torch.cat([active.flatten(1), guesses[:, None]], 1)
    return needed, torch.cat([offset.flatten(1), begins[:, :1] + width - 1], 1)


class Predicted(NamedTuple):
    """What n rows of logits predict."""

    position: Tensor  # [n] int64, absolute
    step: Tensor  # [n] int64, denoise step of the draw; 0 for NEXT and GUESS
    canvas: Tensor  # [n] int64, which canvas a FILL row is of; -1: NEXT or GUESS


def predicted(plan: Plan, batch: Batch, owner: Tensor, place: Tensor) -> Predicted:
    """Of the rows at `place` [n] int64 among the K of the requests `owner` [n] int64."""
    num_canvases, length = plan.canvases.tokens.shape[1:]
    column = place - plan.num_next
    canvas = torch.where((column >= 0) & (column < num_canvases * length), column // length, -1)
    is_fill, is_next = canvas >= 0, column < 0
    whole = batch.computed[owner] + batch.scheduled[owner]
    after = plan.text[owner] if plan.num_next == 1 else place + 1
    follows = torch.where(batch.decodes[owner], plan.state.start[owner] + after, whole)
    start, width = plan.canvases.start, plan.canvases.width
    filled = start[owner, canvas.clamp(min=0)] + column % length
    position = torch.where(is_fill, filled, start[owner, 0] + width[owner, 0])
    position = torch.where(is_next, follows, position)
    # A draft that shares its random number with the verification is confirmed more often.
    step = torch.where(is_fill & ~plan.options.verifies[owner], plan.step[owner], 0)
    return Predicted(position, step, canvas)
