# SPDX-License-Identifier: Apache-2.0
"""What follows from a forward: text is committed or verified, canvases are begun and filled.

Pure functions on tensors that with static shapes read nothing back. B requests, canvases of L
columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_nbdiff.decoding.block_cache import sub_block_begin
from vllm_nbdiff.decoding.canvas import NO_TOKEN, Canvas, CanvasTable, width_at
from vllm_nbdiff.decoding.plan import Batch, Facts, Plan
from vllm_nbdiff.decoding.rules import select


class Text(NamedTuple):
    """What became of the text that a forward read."""

    length: Tensor  # [B] int64, canvas columns that are final now
    seed: Tensor  # [B] int64, the token after them or after a prompt; the mask: there is none
    begin: Tensor  # [B] int64, position of the seed
    kept: Tensor  # [B] bool, the next canvas, looked at in advance, began with the seed guessed


def read_text(
    table: CanvasTable,
    plan: Plan,
    batch: Batch,
    facts: Facts,
    following: Tensor,
    empty: Tensor | None = None,
) -> Text:
    """Commit or verify canvases.

    Args:
        table: of the canvases.
        plan: of the forward.
        batch: the scheduled requests.
        facts: of the batch.
        following: [B, N] int64, the token drawn after each column of a text, where needed; of a
            prompt the first one holds what follows it.
        empty: [B, N] bool, rows in which no token was left to draw; None: there are none.
    """
    state, text = plan.state, plan.text
    length, seed = text, following[:, 0]
    if plan.num_next > 1:
        # What was not asked follows as it stands.
        following = torch.where(plan.rows.needed[:, : plan.num_next], following, _shifted(state))
        right = following[:, :-1] == state.tokens[:, 1:]
        right &= table.columns[:-1] < text[:, None] - 1
        if empty is not None:
            right &= ~empty[:, :-1]
        length = torch.minimum((~right).cumsum(1).eq(0).sum(1) + 1, text)
        seed = following.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]
    begin = state.start + length
    if facts.prefills:
        begin = torch.where(batch.prompt_ends, batch.computed + batch.scheduled, begin)
    if facts.family.seed == "never":
        return Text(length, torch.full_like(seed, facts.mask_token_id), begin, plan.ahead)
    if facts.family.block_causal:
        inside = begin % len(table.columns) > 0
        seed = torch.where(inside, facts.mask_token_id, seed)
    kept = plan.ahead
    if facts.fuses:
        kept = kept & (length == text) & (seed == state.guess)
    return Text(length, seed, begin, kept)


def _shifted(state: Canvas) -> Tensor:
    """[B, L] int64: what stands after each column; anything after the last."""
    return state.tokens.roll(-1, 1)


def begin_canvases(
    table: CanvasTable, plan: Plan, text: Text, batch: Batch, facts: Facts
) -> Canvas:
    """The state with new canvases where they begin."""
    state, begun, start = plan.state, plan.reads, text.begin
    fresh = torch.where(table.columns == 0, text.seed[:, None], facts.mask_token_id)
    if facts.family.block_causal:
        tail = start % len(table.columns)
        start = start - tail
        if batch.tail is not None:
            fresh = torch.where(table.columns < tail[:, None], batch.tail, fresh)
    width = width_at(plan.options, start, facts)
    edits_left = state.edits_left
    if facts.edits:
        edits_left = torch.where(begun, plan.options.max_post_steps, edits_left)
    if facts.static or not begun.all():
        fresh = torch.where(begun[:, None], fresh, state.tokens)
        start = torch.where(begun, start, state.start)
        width = torch.where(begun, width, state.width)
    return Canvas(
        tokens=fresh,
        start=start,
        width=width,
        step=torch.where(begun, 0, state.step),
        guess=torch.where(begun, NO_TOKEN, state.guess) if facts.guesses else state.guess,
        cached=torch.where(begun, -1, state.cached) if facts.caches else state.cached,
        copied=torch.where(begun, 0, state.copied),
        edits_left=edits_left,
    )


class Proposal(NamedTuple):
    """What a denoise step proposes for the canvas that it goes on from, [B, L] each."""

    canvas: Tensor  # int64
    active: Tensor  # bool, columns that may be filled
    token: Tensor  # int64; anything where not active
    probability: Tensor  # float32
    confidence: Tensor  # float32


def choose(plan: Plan, proposal: Proposal, looked: Tensor, facts: Facts) -> Tensor:
    """[B, L] bool: columns that each request's rule takes; looked [B] bool: requests to fill."""
    options, active = plan.options, proposal.active & looked[:, None]
    edited = None
    if facts.edits:
        masked = proposal.canvas == facts.mask_token_id
        edited = active & ~masked & (proposal.token != proposal.canvas)
        edited &= proposal.probability > options.editing_threshold[:, None]
        active &= masked
    filled = active
    if facts.static or not _all_are_due(active, proposal.confidence, plan.quota):
        filled = select(
            facts.rules,
            options.rule,
            active,
            proposal.confidence,
            proposal.probability,
            options.threshold,
            plan.quota,
        )
    return filled if edited is None else filled | edited


def _all_are_due(active: Tensor, confidence: Tensor, quota: Tensor | None) -> bool:
    """Whether a step fills all `active` [B, L] columns, by whatever rule; reads values."""
    if quota is None or (active.sum(1) > quota).any():
        return False
    # What has no confidence ranks no higher than what is not active.
    return torch.equal(active & (confidence > -torch.inf), active)


def stuck(proposal: Proposal, accepted: Tensor, looked: Tensor, facts: Facts) -> Tensor:
    """[B] bool: of requests `looked` [B] bool those of whose masks the `accepted` [B, L] bool
    columns fill none."""
    if not facts.edits:
        return looked & ~accepted.any(1)
    masked = proposal.active & (proposal.canvas == facts.mask_token_id)
    return looked & masked.any(1) & ~(accepted & masked).any(1)


def take_likeliest(
    proposal: Proposal,
    accepted: Tensor,
    candidates: Tensor,
    token: Tensor,
    probability: Tensor,
    mask: int,
) -> tuple[Proposal, Tensor]:
    """The proposal, and what of it is accepted, with the likeliest of the `candidates` [B, L] bool
    columns of each request filled too.

    Args:
        token: [B, L] int64, for the candidates.
        probability: [B, L] float32, of these.
        mask: the mask token.
    """
    likely = probability.masked_fill(~candidates, -1.0)
    best = torch.zeros_like(accepted).scatter(1, likely.argmax(1, keepdim=True), True) & candidates
    # A row that leaves no token gives 0, which may be the mask: any other one ends the step.
    token = torch.where(token == mask, int(mask == 0), token)
    return proposal._replace(token=torch.where(best, token, proposal.token)), accepted | best


def fill(
    table: CanvasTable,
    plan: Plan,
    batch: Batch,
    facts: Facts,
    state: Canvas,
    proposal: Proposal,
    looked: Tensor,
    accepted: Tensor,
    guess: Tensor | None,
) -> Canvas:
    """The state with the `accepted` [B, L] bool columns of requests `looked` [B] bool filled.

    Keeps what was proposed and not taken, for the next step's versions. A canvas without masks is
    final after the first step that edits nothing.

    Args:
        state: the requests' canvases as they are.
        guess: [B] int64, the next canvas's seed or NO_TOKEN; None: no request has one.
    """
    canvas = torch.where(accepted, proposal.token, proposal.canvas)
    if facts.versions:
        left = proposal.active & ~accepted & (proposal.token != facts.mask_token_id)
        left &= looked[:, None]
        table.proposed[batch.slot] = torch.where(left, proposal.token, NO_TOKEN)
        rank = table.rank[batch.slot]  # of others those of drafts
        table.rank[batch.slot] = torch.where(looked[:, None], proposal.confidence, rank)
    state = state._replace(
        tokens=torch.where(looked[:, None], canvas, state.tokens), step=state.step + looked
    )
    if facts.versions:
        highest = torch.where(looked, plan.canvases.exists.sum(1) - 1, 0)
        state = state._replace(copied=torch.maximum(state.copied, highest))
    if facts.caches:
        begin = sub_block_begin(proposal.active, plan.options.sub_block_length)
        state = state._replace(cached=torch.where(looked, begin, state.cached))
    if facts.edits:
        masked = proposal.active & (proposal.canvas == facts.mask_token_id)
        left = torch.where(accepted.any(1), state.edits_left - 1, 0)
        left = torch.where(looked & ~masked.any(1), left, state.edits_left)
        state = state._replace(edits_left=left)
    if guess is not None:
        state = state._replace(guess=torch.where(looked, guess, state.guess))
    return state


def early_ends(
    table: CanvasTable, plan: Plan, batch: Batch, facts: Facts, state: Canvas, looked: Tensor
) -> Tensor:
    """[B, L] bool: columns that end their request, with no mask before them.

    Filled positions never change, so no commit is needed. Drafts may change, and so may what is
    edited until the canvas is final.

    Args:
        state: after filling.
        looked: [B] bool, requests that were filled.
    """
    if facts.verifies:
        looked = looked & ~plan.options.verifies
    if not (facts.static or looked.any()):
        return torch.zeros_like(plan.canvases.active[:, 0])
    positions = state.start[:, None] + table.columns
    ends = table.is_last(batch.slot, plan.options, state.tokens, positions)
    if not (facts.static or ends.any()):
        return ends
    ends &= (table.columns < state.width[:, None]) & looked[:, None]
    masks = (state.tokens == facts.mask_token_id).cumsum(1)
    if facts.edits:
        last = (state.width - 1).clamp(min=0)[:, None]
        final = (masks.gather(1, last)[:, 0] == 0) & (state.edits_left == 0)
        ends &= (final | ~plan.options.edits)[:, None]
    return ends & (masks == 0)
