# SPDX-License-Identifier: Apache-2.0
"""FreeDave: further denoise steps of a canvas, drafted and verified in one forward.

Greedy and lossless: the text is that of one position a step. A canvas is looked at as always, and
beside it drafts of it, the n-th with the n most confident masked positions filled as the forward
before proposed. A draft is right if the canvas one position less full, looked at in this same
forward, fills exactly that position next; then the step it drafts need not be run.

Source: arXiv 2510.00294, its non-eager variant within a block. What it calls the first draft, which
is always right, is the canvas itself here. A draft that fills the block is left out: there is
nothing to verify about the last position.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np

from vllm_nbdiff.decoding import rules
from vllm_nbdiff.decoding.rules import RULES
from vllm_nbdiff.engine.canvas import NO_TOKEN, CanvasState
from vllm_nbdiff.engine.plan import FILL, REFUSED, Batch, Drafts, Plan, Rows
from vllm_nbdiff.engine.sampler import Drawn
from vllm_nbdiff.engine.segments import Segments

Arrays = TypeVar("Arrays", Segments, Rows)
Number = TypeVar("Number", int, np.ndarray)


def draft_room(num_drafts: Number, width: Number, page_size: int) -> Number:
    """Tokens whose pages hold so many drafts of a canvas of `width` tokens, wherever it starts."""
    return num_drafts * ((width + 2 * page_size - 2) // page_size) * page_size


def nested(
    canvas: np.ndarray, proposed: np.ndarray, rank: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Canvases with one to `count` proposals filled in, the most confident first, ties leftmost.

    Args:
        canvas: [B, L] int64.
        proposed: [B, L] int64, NO_TOKEN where there is no proposal.
        rank: [B, L] float, confidence of the proposals.
        count: [B] int64, at most the number of proposals.

    Returns:
        owner [D], level [D] and canvas [D, L] int64, by level, then by owner.
    """
    order = np.argsort(np.where(proposed == NO_TOKEN, np.inf, -rank), axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(canvas.shape[1])[None], axis=1)
    level, owner = (np.arange(count.max(initial=0))[:, None] < count).nonzero()
    level += 1
    filled = np.where(place[owner] < level[:, None], proposed[owner], canvas[owner])
    return owner, level, filled


def add_drafts(state: CanvasState, batch: Batch, plan: Plan) -> Plan:
    """The plan with as many drafts as requests ask for and there is room for."""
    slots = batch.slots
    if not state.num_drafts[slots].any():
        return plan
    count = _count(state, batch, plan)
    owner, level, canvas = nested(plan.canvas, state.proposed[slots], state.rank[slots], count)
    rows = int(plan.segments.length.sum())
    fit = int((rows + plan.width[owner].cumsum() <= batch.max_rows).sum())
    if not fit:
        return plan
    owner, level, canvas = owner[:fit], level[:fit], canvas[:fit]
    width = plan.width[owner]
    masked = canvas == state.config.mask_token_id
    masked &= np.arange(canvas.shape[1]) < width[:, None]
    active = rules.active_positions(
        masked, state.sub_block_length[slots[owner]], np.ones_like(owner)
    )
    start = state.start[slots[owner]]
    segments = Segments(
        owner=owner,
        first=start,
        length=width,
        kv_length=start + width,
        causal=np.zeros(fit, np.bool_),
        version=level,
    )
    draft, column = active.nonzero()
    fills = Rows(
        owner=owner[draft],
        column=column,
        position=start[draft] + column,
        step=state.step[slots[owner]][draft],
        kind=np.full(len(draft), FILL),
        # Shift by one: the row of column j - 1 predicts column j.
        index=(rows + width.cumsum() - width)[draft] + column - 1,
        draft=draft,
    )
    return replace(
        plan,
        segments=_joined(plan.segments, segments),
        rows=_joined(plan.rows, fills),
        drafts=Drafts(owner, level, canvas, active),
    )


def _joined(one: Arrays, other: Arrays) -> Arrays:
    more = vars(other)
    return type(one)(**{name: np.concatenate([own, more[name]]) for name, own in vars(one).items()})


def _count(state: CanvasState, batch: Batch, plan: Plan) -> np.ndarray:
    """Drafts [B] int64 that each request asks for, has proposals for and has pages for."""
    slots = batch.slots
    masked = plan.canvas == state.config.mask_token_id
    masked &= np.arange(masked.shape[1]) < plan.width[:, None]
    proposals = (state.proposed[slots] != NO_TOKEN).sum(1)
    count = np.minimum(np.minimum(state.num_drafts[slots], proposals), masked.sum(1) - 1)
    start = state.start[slots]
    first = start // batch.page_size
    pages = -(-(start + plan.width) // batch.page_size) - first
    versions = (-(-batch.room // batch.page_size) - first) // np.maximum(pages, 1)
    return np.where(plan.look, np.minimum(count, versions - 1), 0).clip(0)


def keep_right_ones(batch: Batch, plan: Plan, drawn: Drawn) -> None:
    """Go on from the last right draft of each request, as if it had been its canvas.

    Changes the plan's canvas, its active columns and, to REFUSED, the kind of the rows of all other
    drafts and canvases.
    """
    rows, drafts, num_reqs = plan.rows, plan.drafts, len(batch.slots)
    assert drafts is not None
    canvas = np.concatenate([plan.canvas, drafts.canvas])
    active = np.concatenate([plan.active, drafts.active])
    fills = np.flatnonzero(rows.kind == FILL)
    line = np.where(rows.draft < 0, rows.owner, num_reqs + rows.draft)[fills]
    where = line, rows.column[fills]
    target = next_canvases(canvas, active, where, drawn.token[fills], drawn.confidence[fills])
    last = last_right(target, num_reqs, drafts)
    plan.canvas, plan.active = canvas[last], active[last]
    rows.kind[fills[line != last[rows.owner[fills]]]] = REFUSED


def next_canvases(
    canvas: np.ndarray,
    active: np.ndarray,
    where: tuple[np.ndarray, np.ndarray],
    token: np.ndarray,
    confidence: np.ndarray,
) -> np.ndarray:
    """Each canvas [N, L] with its most confident active position filled.

    Args:
        canvas: [N, L] int64.
        active: [N, L] bool.
        where: canvas [n] and column [n] of every active position.
        token: [n] int64, what is predicted there.
        confidence: [n] float.
    """
    proposed, rank = canvas.copy(), np.zeros(canvas.shape, np.float32)
    proposed[where], rank[where] = token, confidence
    one = np.ones(len(canvas), np.int64)
    taken = rules.select(RULES["freedave"], active, rank, rank, one, one)
    return np.where(taken, proposed, canvas)


def last_right(target: np.ndarray, num_reqs: int, drafts: Drafts) -> np.ndarray:
    """The last draft of each request before which, itself included, all are right.

    Args:
        target: [B + D, L] int64, canvases and drafts a step later.
        num_reqs: B.
        drafts: of these requests.

    Returns:
        [B] int64, row of `target`; that of the request's canvas if not even its first one is right.
    """
    last = np.arange(num_reqs)
    reached = np.zeros_like(last)
    for level in range(1, int(drafts.level.max(initial=0)) + 1):
        index = np.flatnonzero(drafts.level == level)
        owner = drafts.owner[index]
        right = (drafts.canvas[index] == target[last[owner]]).all(1) & (reached[owner] == level - 1)
        last[owner[right]] = num_reqs + index[right]
        reached[owner[right]] = level
    return last
