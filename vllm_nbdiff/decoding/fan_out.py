# SPDX-License-Identifier: Apache-2.0
"""Drafts that are made in the forward that reads the text before them.

A drafted text is read causally. Verification breaks it off behind some column, and the exact token
that follows there begins the next text. The next forward reads that token, and drafts behind it
with a canvas of masks: what follows the token is exact too, and is where the drafted text begins.

For some of the break points the forward that verifies holds such a canvas already, which sees the
text up to there as AR decoding would; if the text breaks off there, the canvas's predictions are
the next draft, and no token has a forward to itself.

All break points: quadratic self-speculation of Nemotron-Labs-Diffusion (arXiv 2607.05722); the last
one alone: introspective strided decoding of I-DLM. The token that follows a break point is not
known to the canvas behind it, whose first mask stands in its place.

A canvas that does not begin behind the whole text has pages of its own, which hold the text before
it too as far as that lies on the first of them.

B requests, F canvases each, of L columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vllm_nbdiff.decoding.canvas import Canvas, CanvasTable, Options, width_at
from vllm_nbdiff.decoding.indices import indices
from vllm_nbdiff.decoding.segments import Canvases

if TYPE_CHECKING:
    from vllm_nbdiff.decoding.decide import Text
    from vllm_nbdiff.decoding.plan import Batch, Facts, Plan


def text_of(
    table: CanvasTable,
    state: Canvas,
    options: Options,
    batch: Batch,
    facts: Facts,
    count: Tensor,
) -> Tensor:
    """[B] int64: columns of drafted texts that are worth verifying, the seed in any case; none
    where a request ended, which may have been scheduled again before that was known.

    Args:
        count: [B, L] int64, masked columns of each canvas up to each.
    """
    worth = count == 0
    if facts.fan_out:
        # How sure drafts are is kept for those who may draft for break points.
        likely = survival(table.rank[batch.slot]) >= options.least_survival[:, None]
        worth &= likely | (options.fan_out == 0)[:, None]
    return torch.minimum(worth.sum(1).clamp(min=1), state.width.clamp(min=0))


def canvases(
    table: CanvasTable,
    state: Canvas,
    options: Options,
    batch: Batch,
    facts: Facts,
    drafting: Tensor,
    text: Tensor,
    breaks: Tensor,
) -> Canvases:
    """Canvases behind tokens that are read alone, and behind break points, of the requests that are
    `drafting` [B] bool.

    As many as they ask for, are likely enough, and have pages and rows for.

    Args:
        text: [B] int64, columns of the state's canvas that are read.
        breaks: [B] int64, columns behind which the text may go on: all but one that ends it.
    """
    alone = (drafting & (text == 1) & (breaks == 1))[:, None]
    # The row before a column predicts it where the family shifts: the last one is of no use.
    unused = int(facts.family.shifts)
    if facts.fan_out:
        points, chance = likeliest(table.rank[batch.slot], text, breaks, facts.fan_out)
        order = indices(points.shape[1], text.device)
        exists = drafting[:, None] & (chance > 0) & (order < options.fan_out[:, None])
        exists = (exists & (chance >= options.least_chance[:, None])) | (alone & (order == 0))
        start = state.start[:, None] + points + 1
    else:
        exists, start = alone, state.start[:, None] + 1
    width = width_at(options, start, facts)
    # Behind a single token even a short draft is better than none.
    room = torch.minimum(batch.max_rows - 1, batch.room - state.start - 1)[:, None] + unused
    width = torch.where(alone, torch.minimum(width, room), width)
    rows = width - unused
    exists = exists & (width > 1)
    moved = torch.zeros_like(width)
    if facts.fan_out:
        moved, fits = _own_pages(state, options, batch, facts, text, start, rows, exists)
        exists &= fits
        exists &= text[:, None] + torch.where(exists, rows, 0).cumsum(1) <= batch.max_rows[:, None]
    columns = (table.columns > 0) & (table.columns < width[..., None]) & exists[..., None]
    tokens = torch.full_like(columns, facts.mask_token_id, dtype=torch.int64)
    return Canvases(
        tokens, columns, exists, start, width, torch.zeros_like(width), rows, rows, moved
    )


def joined(drafting: Tensor, own: Canvases, others: Canvases) -> Canvases:
    """The canvases of requests that are `drafting` [B] bool, and those of the others."""
    return Canvases(*(_either(drafting, *pair) for pair in zip(own, others, strict=True)))


def _either(own: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """[B, C, ...]: `one` of the requests `own` [B] bool, `other` of the others; C may differ."""
    count = max(one.shape[1], other.shape[1])

    def filled(values: Tensor) -> Tensor:
        rest = values[:, :1].expand(-1, count - values.shape[1], *values.shape[2:])
        if values.dtype == torch.bool:
            rest = torch.zeros_like(rest)
        return torch.cat([values, rest], dim=1)

    return torch.where(own.view(-1, *[1] * (one.dim() - 1)), filled(one), filled(other))


def survival(confidence: Tensor) -> Tensor:
    """[B, L] float: chance that a column and all before it are right; the seed, column 0, is.

    Args:
        confidence: [B, L] float, probability that a column is right, given those before it.
    """
    sure = confidence.clamp(0, 1)
    sure[:, 0] = 1
    return sure.cumprod(1)


def likeliest(
    confidence: Tensor, text: Tensor, breaks: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` likeliest break points of each text, in order, and how likely they are.

    Verification breaks off behind column m if all columns up to it are right and the next is not.
    Of equals the leftmost comes first.

    Args:
        confidence: [B, L] float, probability that a column is right, given those before it.
        text: [B] int64, columns.
        breaks: [B] int64, of them those that may be break points.
        count: at most L.

    Returns:
        [B, count] int64 columns, [B, count] float; 0 where there is none.
    """
    columns = indices(confidence.shape[1], text.device)
    reached = torch.where(columns < text[:, None], survival(confidence), 0)
    # Behind the last column nothing can be wrong.
    chance = reached - torch.nn.functional.pad(reached[:, 1:], (0, 1))
    # A break point that is thought impossible still comes before one that does not exist.
    chance = torch.where(columns < breaks[:, None], chance.clamp(min=1e-9), 0)
    order = chance.argsort(dim=1, descending=True, stable=True)[:, :count]
    return order, chance.gather(1, order)


def _own_pages(
    state: Canvas,
    options: Options,
    batch: Batch,
    facts: Facts,
    text: Tensor,
    start: Tensor,
    rows: Tensor,
    exists: Tensor,
) -> tuple[Tensor, Tensor]:
    """Pages by which canvases at `start` [B, F] of `rows` [B, F] lie behind their place, and
    whether the request has them, [B, F] each."""
    page = facts.page_size
    first, behind = start // page, (start + rows + page - 1) // page
    apart = exists & (start < (state.start + text)[:, None])
    count = torch.where(apart, behind - first, 0)
    last = count.cumsum(1)
    # Behind the whole text and the canvas that begins there.
    base = (state.start + text + options.block_length + page - 1) // page
    moved = torch.where(apart, base[:, None] + last - count - first, 0)
    have = (batch.room + page - 1) // page
    return moved, torch.where(apart, base[:, None] + last, behind) <= have[:, None]


class Drafts(NamedTuple):
    """What canvases gave the texts that broke off before them, [B, L] each."""

    token: Tensor  # int64, the mask where nothing is drafted
    confidence: Tensor  # float32
    hit: Tensor  # [B] bool, there was such a canvas


def drafts(plan: Plan, text: Text, token: Tensor, probability: Tensor, mask: int) -> Drafts:
    """The drafts of the canvases that begin where texts broke off.

    Args:
        plan: of the forward.
        text: what became of the texts.
        token: [B, C, L] int64, predicted for the columns of each canvas.
        probability: [B, C, L] float32.
        mask: the mask token.
    """
    canvases = plan.canvases
    drafting = plan.options.drafts & (plan.text > 0)
    begins = canvases.exists & (canvases.start == text.begin[:, None]) & drafting[:, None]
    requests = indices(len(begins), begins.device)
    found, hit = begins.int().argmax(1), begins.any(1)
    drafted = canvases.active[requests, found] & hit[:, None]
    return Drafts(
        torch.where(drafted, token[requests, found], mask), probability[requests, found], hit
    )


class VerifiedTexts(NamedTuple):
    """What became of the texts of a forward, some of which were verified."""

    plan: Plan
    length: Tensor  # [B] int64, columns that held
    hit: Tensor | None  # [B] bool, whose next draft is there already; None: nobody's

    def numbers(self) -> tuple[Tensor, ...]:
        """[B] int64 each, those of `chooser.Verified` in its order: columns of the canvas that is
        verified or, behind a token that is read alone, drafted; those that are verified; that held;
        1 of hits; rows in the forward."""
        plan, hit = self.plan, self.hit
        alone = plan.canvases.exists[:, 0] & (plan.text == 1)
        width = torch.where(alone, plan.canvases.width[:, 0], plan.state.width)
        hit = torch.zeros_like(width) if hit is None else hit.long()
        return width, plan.text, self.length, hit, plan.segments.length.sum(1)


def made(plan: Plan, hit: Tensor) -> tuple[Tensor, Tensor]:
    """[B] int64: drafts for break points of texts that were drafted themselves; [B] bool: which of
    these broke off at one of them, of the requests `hit` [B] bool whose next draft is there."""
    drafted = (plan.text > 1) & (plan.options.fan_out > 0)
    return torch.where(drafted, plan.canvases.exists.sum(1), 0), hit & drafted


def keep(table: CanvasTable, batch: Batch, facts: Facts, state: Canvas, found: Drafts) -> Canvas:
    """The state with drafts behind the seeds of canvases that have begun."""
    columns = (table.columns > 0) & (table.columns < state.width[:, None]) & found.hit[:, None]
    if facts.fan_out:
        # Of padding and of requests that draft otherwise nothing changes.
        table.rank[batch.slot] = torch.where(columns, found.confidence, table.rank[batch.slot])
    return state._replace(tokens=torch.where(columns, found.token, state.tokens))
