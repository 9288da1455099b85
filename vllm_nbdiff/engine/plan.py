# SPDX-License-Identifier: Apache-2.0
"""What one forward of a batch does: its segments, and whose rows of logits are needed.

A request takes part with a causal segment (prompt tokens, a full canvas that is committed, drafted
tokens that are verified), a bidirectional one (a canvas to denoise), or both: the commit of a block
and the first denoise step of the next one, whose seed is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_nbdiff.decoding import rules
from vllm_nbdiff.engine.canvas import NO_TOKEN, CanvasState
from vllm_nbdiff.engine.segments import Segments

FILL, NEXT, GUESS, REFUSED = 0, 1, 2, 3
"""Kinds of needed rows: a canvas position, the token after causal text, the next block's seed; a
position of a draft that proved wrong."""


@dataclass
class Batch:
    """The scheduled requests, B of them, by batch index."""

    slots: np.ndarray  # [B] int64
    scheduled: np.ndarray  # [B] int64, prompt tokens, or tokens that a decode may emit
    prefilling: np.ndarray  # [B] bool
    prefill_ends: np.ndarray  # [B] bool, the scheduled tokens hold the prompt's last one
    computed: np.ndarray  # [B] int64, prompt tokens computed before
    room: np.ndarray  # [B] int64, positions below it have pages
    page_size: int
    prompt_ids: np.ndarray  # int32, scheduled tokens of all requests
    prompt_start: np.ndarray  # [B] int32, where those of a request begin
    max_rows: int


@dataclass
class Rows:
    """The n rows of logits that a forward needs."""

    owner: np.ndarray  # [n] int64, batch index
    column: np.ndarray  # [n] int64, canvas column: to fill (FILL), or of the row itself (NEXT)
    position: np.ndarray  # [n] int64, absolute position predicted
    step: np.ndarray  # [n] int64, denoise step; 0 for NEXT and GUESS
    kind: np.ndarray  # [n] int64
    index: np.ndarray  # [n] int64, token row of the forward
    draft: np.ndarray  # [n] int64, index in `Drafts`, -1: the request's canvas or text


@dataclass
class Drafts:
    """D canvases with more positions filled than the one that is looked at; see `drafts.py`.

    Their segments are the last ones of the forward, in this order: by level, then by owner.
    """

    owner: np.ndarray  # [D] int64, batch index
    level: np.ndarray  # [D] int64, so many positions more than the canvas, at least 1
    canvas: np.ndarray  # [D, L] int64
    active: np.ndarray  # [D, L] bool, columns that may be filled


@dataclass
class Plan:
    """One forward of B requests. "Looked at" is the canvas that is denoised, if any."""

    segments: Segments
    rows: Rows
    text: np.ndarray  # [B] int64, canvas columns read causally: committed or verified; 0: none
    look: np.ndarray  # [B] bool, a canvas is denoised
    ahead: np.ndarray  # [B] bool, it is the next one, behind `text`
    canvas: np.ndarray  # [B, L] int64, the canvas looked at
    width: np.ndarray  # [B] int64, its columns
    active: np.ndarray  # [B, L] bool, columns that may be filled
    quota: np.ndarray  # [B] int64, least number of columns to fill
    drafts: Drafts | None = None


def make_plan(state: CanvasState, batch: Batch) -> Plan:
    """What the coming forward of `batch` has to do."""
    slots, num_reqs = batch.slots, len(batch.slots)
    mask = state.config.mask_token_id
    columns = np.arange(state.tokens.shape[1])
    start, width, step = state.start[slots], state.width[slots], state.step[slots]
    # With a step in flight the scheduler may cut a canvas near the model's length: not computed.
    decodes = ~batch.prefilling & (width <= batch.scheduled)
    canvas = state.tokens[slots]
    masked = (canvas == mask) & (columns < width[:, None]) & decodes[:, None]
    has_mask = masked.any(1)
    drafted = state.verifies[slots] & (step >= state.max_steps[slots])
    filled = np.where(has_mask, masked.argmax(1), width)
    text = np.where(decodes & (~has_mask | drafted), filled, 0)

    ahead = _runs_ahead(state, batch, text)
    if ahead.any():
        start = np.where(ahead, start + text, start)
        width = np.where(ahead, state.width_at(slots, start), width)
        step = np.where(ahead, 0, step)
        canvas = np.where(ahead[:, None], mask, canvas)
        canvas[:, 0] = np.where(ahead, state.guess[slots], canvas[:, 0])
        masked = (canvas == mask) & (columns < width[:, None]) & decodes[:, None]
    look = masked.any(1) & ((text == 0) | ahead)
    ahead &= look
    masked &= look[:, None]

    steps_left = np.maximum(state.max_steps[slots] - step, 1)
    quota = rules.fill_quota(masked.sum(1), steps_left)
    active = rules.active_positions(masked, state.sub_block_length[slots], quota)
    low, high = _looked_columns(state, slots, active, width, look & ~ahead)

    lengths = np.stack(
        [np.where(batch.prefilling, batch.scheduled, text), np.where(look, high - low, 0)], axis=1
    )
    ends = lengths.cumsum().reshape(num_reqs, 2)
    text_row, look_row = (ends - lengths).T
    text_start = np.where(batch.prefilling, batch.computed, state.start[slots])
    first = np.stack([text_start, start + low], axis=1)
    kv_length = np.stack([text_start + lengths[:, 0], start + width], axis=1)
    used = lengths.ravel() > 0
    segments = Segments(
        owner=np.repeat(np.arange(num_reqs), 2)[used],
        first=first.ravel()[used],
        length=lengths.ravel()[used],
        kv_length=kv_length.ravel()[used],
        causal=np.tile([True, False], num_reqs)[used],
        version=np.zeros(int(used.sum()), np.int64),
    )
    text_owner, text_column = _text_rows(state, batch, text)
    fill_owner, fill_column = active.nonzero()
    # A seed is guessed where this step may fill the last masked position.
    guess_owner = (look & state.fuses[slots] & (active == masked).all(1)).nonzero()[0]
    last = width[guess_owner] - 1
    # A draft that shares its random number with the verification is confirmed more often.
    draw_step = np.where(state.verifies[slots], 0, step)
    rows = Rows(
        owner=np.concatenate([text_owner, fill_owner, guess_owner]),
        column=np.concatenate([text_column, fill_column, last]),
        position=np.concatenate(
            [
                text_start[text_owner] + text_column + 1,
                start[fill_owner] + fill_column,
                start[guess_owner] + last + 1,
            ]
        ),
        step=np.concatenate(
            [np.zeros_like(text_owner), draw_step[fill_owner], np.zeros_like(guess_owner)]
        ),
        kind=np.repeat([NEXT, FILL, GUESS], [len(text_owner), len(fill_owner), len(guess_owner)]),
        index=np.concatenate(
            [
                text_row[text_owner] + text_column,
                # Shift by one: the row of column j - 1 predicts column j.
                look_row[fill_owner] + fill_column - 1 - low[fill_owner],
                look_row[guess_owner] + last - low[guess_owner],
            ]
        ),
        draft=np.full(len(text_owner) + len(fill_owner) + len(guess_owner), -1),
    )
    return Plan(segments, rows, text, look, ahead, canvas, width, active, quota)


def _text_rows(state: CanvasState, batch: Batch, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner and row within the causal segment of every next token that is needed.

    Verification needs all of them, a commit and the end of a prompt the last.
    """
    verified = state.verifies[batch.slots]
    count = np.where(verified, text, np.minimum(text, 1)) + batch.prefill_ends
    owner = np.repeat(np.arange(len(text)), count)
    length = np.where(batch.prefilling, batch.scheduled, text)
    shift = np.repeat(length - count.cumsum(), count)
    return owner, np.arange(len(owner)) + shift


def _runs_ahead(state: CanvasState, batch: Batch, text: np.ndarray) -> np.ndarray:
    """[B] bool, requests whose next canvas is denoised in the forward that commits this one."""
    ahead = (text > 0) & (state.guess[batch.slots] != NO_TOKEN)
    if not ahead.any():
        return ahead
    start = state.start[batch.slots] + text
    width = state.width_at(batch.slots, start)
    ahead &= (width > 1) & (start <= state.last_position[batch.slots])
    ahead &= start + width <= batch.room
    rows = np.where(batch.prefilling, batch.scheduled, np.maximum(text, state.width[batch.slots]))
    extra = np.where(ahead, width, 0).cumsum()
    return ahead & (rows.sum() + extra <= batch.max_rows)


def _looked_columns(
    state: CanvasState,
    slots: np.ndarray,
    active: np.ndarray,
    width: np.ndarray,
    current: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Range of canvas columns [low, high) that a denoise step computes, [B] each.

    With the block cache, only the active sub-block and the column before it, once the KV of the
    whole canvas was written when that sub-block began (Fast-dLLM v2).
    """
    low = np.zeros_like(width)
    high = width.copy()
    reuse = current & state.caches[slots] & active.any(1)
    if reuse.any():
        size = state.sub_block_length[slots]
        begin = active.argmax(1) // size * size
        end = begin + size
        within = ~(active & (np.arange(active.shape[1]) >= end[:, None])).any(1)
        reuse &= within & (state.cached[slots] == begin)
        low = np.where(reuse, np.maximum(begin - 1, 0), low)
        high = np.where(reuse, np.minimum(end, width), high)
    return low, high
