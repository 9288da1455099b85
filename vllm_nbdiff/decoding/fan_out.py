# SPDX-License-Identifier: Apache-2.0
"""Drafts that are made in the forward that verifies the text before them.

A drafted text is read causally. Verification breaks it off behind some column, and the exact token
that follows there begins the next text. For some of these break points the same forward holds a
canvas of masks behind that column, which sees the text up to it as AR decoding would; if the text
breaks off there, the canvas's predictions are the next draft. Where it breaks off elsewhere, the
next forward reads the one token that is known, and drafts behind it: its only break point.

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
from vllm_nbdiff.decoding.segments import Canvases

if TYPE_CHECKING:
    from vllm_nbdiff.decoding.decide import Text
    from vllm_nbdiff.decoding.plan import Batch, Facts, Plan


def add(
    table: CanvasTable,
    state: Canvas,
    options: Options,
    batch: Batch,
    facts: Facts,
    text: Tensor,
    canvases: Canvases,
) -> Canvases:
    """The canvases, in place of which requests that draft for break points have those for them.

    As many as requests ask for, are likely enough, and have pages and rows for.

    Args:
        text: [B] int64, columns of the state's canvas that are verified.
        canvases: of all requests, [B, C].
    """
    drafting = (options.fan_out > 0) & batch.decodes & (text > 0)
    points, chance = likeliest(table.rank[batch.slot], text, facts.fan_out)
    order = torch.arange(points.shape[1], device=text.device)
    start = state.start[:, None] + points + 1
    width = width_at(options, start, facts.max_model_len)
    # The row before a column predicts it where the family shifts: the last one is of no use.
    rows = width - int(facts.family.shifts)
    exists = drafting[:, None] & (chance > 0) & (width > 1) & (order < options.fan_out[:, None])
    exists &= (chance >= options.least_chance[:, None]) | (text == 1)[:, None]
    moved, fits = _own_pages(state, options, batch, facts, text, start, rows, exists)
    exists &= fits
    exists &= text[:, None] + torch.where(exists, rows, 0).cumsum(1) <= batch.max_rows[:, None]
    columns = (table.columns > 0) & (table.columns < width[..., None]) & exists[..., None]
    tokens = torch.full_like(columns, facts.mask_token_id, dtype=torch.int64)
    low = torch.zeros_like(width)
    own = Canvases(tokens, columns, exists, start, width, low, rows, rows, moved)
    return Canvases(*(_either(drafting, *pair) for pair in zip(own, canvases, strict=True)))


def _either(own: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """[B, C, ...]: `one` of the requests `own` [B] bool, `other` of the others; C may differ."""
    count = max(one.shape[1], other.shape[1])

    def filled(values: Tensor) -> Tensor:
        rest = values[:, :1].expand(-1, count - values.shape[1], *values.shape[2:])
        if values.dtype == torch.bool:
            rest = torch.zeros_like(rest)
        return torch.cat([values, rest], dim=1)

    return torch.where(own.view(-1, *[1] * (one.dim() - 1)), filled(one), filled(other))


def worthwhile(confidence: Tensor, known: Tensor, least: Tensor) -> Tensor:
    """[B] int64: how many of the `known` [B] columns of drafted texts are worth verifying, the seed
    in any case.

    Args:
        confidence: as of `likeliest`.
        least: [B] float, chance that a column and all before it are right.
    """
    columns = torch.arange(confidence.shape[1], device=known.device)
    survival = torch.where(columns > 0, confidence.clamp(0, 1), 1.0).cumprod(1)
    worth = (survival >= least[:, None]) & (columns < known[:, None])
    return worth.sum(1).clamp(min=1)


def likeliest(confidence: Tensor, text: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest break points of each text, in order, and how likely they are.

    Verification breaks off behind column m if all columns up to it are right and the next is not.
    Of equals the leftmost comes first.

    Args:
        confidence: [B, L] float, probability that a column is right, given those before it.
        text: [B] int64, columns.
        count: at most L.

    Returns:
        [B, count] int64 columns, [B, count] float; 0 where there is none.
    """
    columns = torch.arange(confidence.shape[1], device=text.device)
    inside = columns < text[:, None]
    sure = torch.where((columns > 0) & inside, confidence.clamp(0, 1), 1.0)
    wrong = torch.where(columns + 1 < text[:, None], 1 - sure.roll(-1, 1), 1.0)
    # A break point that is thought impossible still comes before one that does not exist.
    chance = torch.where(inside, (sure.cumprod(1) * wrong).clamp(min=1e-9), 0)
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
    drafting = (plan.options.fan_out > 0) & (plan.text > 0)
    begins = canvases.exists & (canvases.start == text.begin[:, None]) & drafting[:, None]
    requests = torch.arange(len(begins), device=begins.device)
    found, hit = begins.int().argmax(1), begins.any(1)
    drafted = canvases.active[requests, found] & hit[:, None]
    return Drafts(
        torch.where(drafted, token[requests, found], mask), probability[requests, found], hit
    )


def keep(table: CanvasTable, plan: Plan, batch: Batch, state: Canvas, found: Drafts) -> Canvas:
    """The state with drafts behind the seeds of canvases that have begun."""
    columns = (table.columns > 0) & (table.columns < state.width[:, None]) & found.hit[:, None]
    # Of padding and of requests that draft otherwise nothing changes.
    table.rank[batch.slot] = torch.where(columns, found.confidence, table.rank[batch.slot])
    return state._replace(tokens=torch.where(columns, found.token, state.tokens))
