# SPDX-License-Identifier: Apache-2.0
"""FreeDave: further denoise steps of a canvas, drafted and verified in one forward.

Greedy and lossless: the text is that of one position a step. A canvas is looked at as always, and
beside it versions of it, the n-th with the n most confident masked positions filled as the forward
before proposed. A version is right if the one a position less full, looked at in this same forward,
fills exactly that position next; then the step it stands for need not be run.

Source: arXiv 2510.00294, its non-eager variant within a block. What it calls the first draft, which
is always right, is the canvas itself here. A draft that fills the block is left out: there is
nothing to verify about the last position.

B requests, C canvases each: the canvas and C - 1 versions, of L columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_nbdiff.decoding.canvas import NO_TOKEN, Canvas, CanvasTable, Options
from vllm_nbdiff.decoding.indices import indices
from vllm_nbdiff.decoding.rules import active_positions
from vllm_nbdiff.decoding.segments import Canvases

if TYPE_CHECKING:
    from vllm_nbdiff.decoding.plan import Batch, Facts


def add(
    table: CanvasTable,
    state: Canvas,
    options: Options,
    batch: Batch,
    facts: Facts,
    canvas: Canvases,
) -> Canvases:
    """The canvas [B, 1] that is looked at, and behind it its versions.

    As many versions as requests ask for, have proposals for, and have pages and rows for.
    """
    if not facts.versions:
        return canvas
    proposed = table.proposed[batch.slot]
    tokens, look = canvas.tokens[:, 0], canvas.exists[:, 0]
    pages = _touched_pages(state, facts)
    count = _count(state, options, batch, facts, pages, tokens, proposed, look)
    shown = nested(tokens, proposed, table.rank[batch.slot], facts.versions)
    masked = shown == facts.mask_token_id
    masked &= (table.columns < state.width[:, None])[:, None]
    level = indices(facts.versions + 1, count.device)
    exists = look[:, None] & (level <= count[:, None])
    size = options.sub_block_length[:, None].expand(exists.shape)
    active = active_positions(masked, size, None) & exists[:, :, None]
    active[:, 0] = canvas.active[:, 0]
    start, width, low, high, seen, _ = (field.expand(exists.shape) for field in canvas[3:])
    moved = level * pages[:, None]
    return Canvases(shown, active, exists, start, width, low, high, seen, moved)


def nested(canvas: Tensor, proposed: Tensor, rank: Tensor, count: int) -> Tensor:
    """The canvas, then with one to `count` proposals filled in, the most confident first.

    Ties go to the leftmost position.

    Args:
        canvas: [B, L] int64.
        proposed: [B, L] int64, NO_TOKEN where there is no proposal.
        rank: [B, L] float, confidence of the proposals.
        count: of versions; one with more fillings than proposals equals the one before it.

    Returns:
        [B, 1 + count, L] int64.
    """
    absent = proposed == NO_TOKEN
    order = rank.masked_fill(absent, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = indices(canvas.shape[1], canvas.device).expand(order.shape)
    place = torch.empty_like(order).scatter(1, order, places)
    level = indices(count + 1, canvas.device)[:, None]
    filled = (place[:, None] < level) & ~absent[:, None]
    return torch.where(filled, proposed[:, None], canvas[:, None])


def of_level(values: Tensor, level: Tensor | None) -> Tensor:
    """[B, L]: of [B, C, L] the canvas of that `level` [B] int64; None: the first."""
    if level is None:
        return values[:, 0]
    return values[indices(len(level), level.device), level]


def _count(
    state: Canvas,
    options: Options,
    batch: Batch,
    facts: Facts,
    pages: Tensor,
    canvas: Tensor,
    proposed: Tensor,
    look: Tensor,
) -> Tensor:
    """Versions [B] int64 of each request, whose canvases touch `pages` [B]."""
    columns = indices(canvas.shape[1], canvas.device)
    masked = (canvas == facts.mask_token_id) & (columns < state.width[:, None])
    proposals = (proposed != NO_TOKEN).sum(1)
    count = torch.minimum(options.max_versions, torch.minimum(proposals, masked.sum(1) - 1))
    page = facts.page_size
    fit = ((batch.room + page - 1) // page - state.start // page) // pages - 1
    rows = batch.max_rows // state.width.clamp(min=1) - 1
    return torch.where(look, torch.minimum(count, torch.minimum(fit, rows)), 0).clamp(min=0)


def _touched_pages(state: Canvas, facts: Facts) -> Tensor:
    """[B] int64: pages of the canvases; a version has so many of its own."""
    page = facts.page_size
    return ((state.start + state.width + page - 1) // page - state.start // page).clamp(min=1)


def last_right(
    canvas: Tensor, exists: Tensor, active: Tensor, token: Tensor, confidence: Tensor
) -> Tensor:
    """The last version of each request before which, itself included, all are right.

    Args:
        canvas: [B, C, L] int64.
        exists: [B, C] bool.
        active: [B, C, L] bool.
        token: [B, C, L] int64, what is predicted for active columns.
        confidence: [B, C, L] float.

    Returns:
        [B] int64 in [0, C); 0 if not even the first one is right.
    """
    best = confidence.masked_fill(~active, -torch.inf).argmax(dim=2, keepdim=True)
    filled = canvas.scatter(2, best, token.gather(2, best))
    right = (filled[:, :-1] == canvas[:, 1:]).all(2) & exists[:, 1:]
    return (~right).cumsum(1).eq(0).sum(1)
