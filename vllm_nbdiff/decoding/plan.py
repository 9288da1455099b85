# SPDX-License-Identifier: Apache-2.0
"""What one forward of a batch does: its segments, and whose rows of logits are needed.

A request takes part with text (of a prompt, a full canvas that is committed, a draft that is
verified), with canvases (one to denoise, and versions of it), or both: the commit of a block and
the first denoise step of the next one, whose seed is guessed or does not exist.

Pure functions on tensors that with static shapes read nothing back. B requests, S segments and C
canvases of L columns each, K rows that may be needed; what of them is used is a value, not a shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_nbdiff.decoding import fan_out, versions
from vllm_nbdiff.decoding.block_cache import looked_columns
from vllm_nbdiff.decoding.canvas import NO_TOKEN, Canvas, CanvasTable, Options, width_at
from vllm_nbdiff.decoding.needed import Rows, needed_rows
from vllm_nbdiff.decoding.rules import active_positions, even_quota, fill_quota
from vllm_nbdiff.decoding.segments import Canvases, Segments, lay_out, no_canvas, own_canvas
from vllm_nbdiff.families.family import NBDIFF, Family


class Facts(NamedTuple):
    """What the host knows of a batch; it saves work and decides shapes, never results."""

    mask_token_id: int
    max_model_len: int
    page_size: int
    rules: tuple[int, ...]  # places of the requests' rules in `rules.RULES`
    static: bool = False  # no shape may depend on values: what CUDA graphs ask for
    prefills: bool = True  # some requests have prompt tokens scheduled
    verifies: bool = True
    fuses: bool = True
    caches: bool = True
    limits: bool = True  # some have a `max_steps` below NO_LIMIT
    versions: int = 0  # most versions of a request's canvas
    drafts: bool = False  # some requests make drafts in the forwards that read text
    fan_out: int = 0  # most break points of such a request for which canvases are looked at
    denoises: bool = True  # some canvas is looked at otherwise; no: all that decode are lossless
    texts: bool = True  # some request takes part with text; only `of_forward` says no
    looks: bool = True  # some does with a canvas; likewise
    rows: int = 0  # most rows of logits that one request needs
    family: Family = NBDIFF
    blocks: int = 1  # most segments of a request's text: blocks of a prompt, where they see all
    splits: bool = False  # some rule splits a block evenly over its steps
    edits: bool = False  # some rule fills positions again

    @property
    def exclusive(self) -> bool:
        """Whether every request has one segment at most."""
        return not (self.fuses or self.versions or self.drafts or self.blocks > 1)

    def of_forward(self, text: Tensor) -> Facts:
        """What is known, while it is planned, of a forward that reads `text` [B] columns, where
        values may be read."""
        if self.static or self.prefills or self.drafts:
            return self
        reads = text > 0
        texts = bool(reads.any())
        return self._replace(texts=texts, looks=not texts or self.fuses or not reads.all())

    @property
    def guesses(self) -> bool:
        """Whether a fused commit has a seed to guess."""
        return self.fuses and self.family.seed != "never"


class Batch(NamedTuple):
    """The scheduled requests."""

    slot: Tensor  # [B] int64
    decodes: Tensor  # [B] bool, a canvas is scheduled
    scheduled: Tensor  # [B] int64, tokens: of the prompt, or that a decode may emit
    computed: Tensor  # [B] int64, prompt tokens computed before
    prompt_ends: Tensor  # [B] bool, the scheduled tokens hold the prompt's last one
    room: Tensor  # [B] int64, positions below it have pages
    max_rows: Tensor  # [B] int64, rows of canvases and text that a forward may have
    tail: Tensor | None = None
    """[B, L] int64: where the context is block-causal, what a prompt that ends here has from the
    last multiple of L on; anything behind its end."""


class Denoised(NamedTuple):
    """What `Plan` says of canvases that are denoised, by the same names."""

    look: Tensor
    ahead: Tensor
    step: Tensor
    quota: Tensor | None


class Plan(NamedTuple):
    """One forward. "Looked at" is the canvas that is denoised, if any, and its versions; or those
    that begin where a text that is verified may break off."""

    state: Canvas  # as it was
    options: Options
    segments: Segments
    rows: Rows
    num_next: int  # of the K rows; the rest is C * L of FILL, then those of GUESS
    canvases: Canvases  # that are looked at
    text: Tensor  # [B] int64, canvas columns that are committed or verified; 0: none
    ends: Tensor | None  # [B] bool, the request ends with them; None: nobody's does
    reads: Tensor  # [B] bool, there are some, or the last token of a prompt: a canvas begins
    look: Tensor  # [B] bool, a canvas is denoised
    ahead: Tensor  # [B] bool, it is the next one, behind `text`
    step: Tensor  # [B] int64, denoise steps done on it
    quota: Tensor | None  # [B] int64, least number of columns to fill; None: 1

    @property
    def end_of_fill(self) -> int:
        """How many of the K rows are NEXT or FILL, where some canvas is looked at."""
        return self.num_next + self.canvases.active[0].numel()


def make_plan(
    table: CanvasTable, state: Canvas, options: Options, batch: Batch, facts: Facts
) -> Plan:
    """What the coming forward of `batch` has to do."""
    columns, mask = table.columns, facts.mask_token_id
    within, asks = columns < state.width[:, None], state.width
    if facts.family.block_causal:
        fixed = fixed_columns(options, state.start)
        within &= columns >= fixed[:, None]
        if not facts.static:
            asks = asks - fixed  # what is scheduled is what may be emitted, else rows
    # With a step in flight the scheduler may cut a canvas near the model's length: not computed.
    decodes = batch.decodes & (asks <= batch.scheduled)
    masked = (state.tokens == mask) & within & decodes[:, None]
    count = masked.cumsum(1)
    if not facts.denoises:
        return _plan_verified(table, state, options, batch, facts, decodes, count)
    full = count[:, -1] == 0
    final = full & ((state.edits_left == 0) | ~options.edits) if facts.edits else full
    text = torch.where(final & decodes, state.width, 0)
    if facts.verifies:
        drafted = options.verifies & (state.step >= options.max_steps) & ~full
        text = torch.where(drafted, (count == 0).sum(1), text)
    if facts.drafts:
        drafting = options.drafts & decodes
        own = fan_out.text_of(table, state, options, batch, facts, count)
        text = torch.where(drafting, own, text)
    facts = facts.of_forward(text)
    breaks = text
    if facts.texts:
        text, breaks = _until_end(table, state, options, batch, facts, text)
    if not facts.looks:
        return _plan_of(state, options, batch, facts, text, breaks, no_canvas(state), None)

    start, width, step, canvas = state.start, state.width, state.step, state.tokens
    ahead = torch.zeros_like(full)
    if facts.fuses and facts.texts:
        ahead = _runs_ahead(state, options, batch, text, facts) & (breaks == text)
        start = torch.where(ahead, start + text, start)
        width = torch.where(ahead, width_at(options, start, facts), width)
        step = torch.where(ahead, 0, step)
        canvas = torch.where(ahead[:, None], mask, canvas)
        if facts.guesses:
            canvas[:, 0] = torch.where(ahead, state.guess, canvas[:, 0])
        next_masked = (canvas == mask) & (columns < width[:, None])
        masked = torch.where(ahead[:, None], next_masked, masked)
    if facts.verifies and facts.texts:
        masked &= ((text == 0) | ahead)[:, None]
    num_masked = masked.sum(1)
    quota = _quotas(options, step, num_masked, facts)
    active = active_positions(masked, options.sub_block_length, quota)
    look = num_masked > 0
    if facts.edits:
        known = within & ~masked & (options.edits & decodes & (text == 0))[:, None]
        active, look = active | known, look | known.any(1)
    ahead &= look
    computed = None
    if facts.caches:
        computed = looked_columns(state, options, facts.family, active, width, look & ~ahead)
    canvases = own_canvas(canvas, active, look, start, width, computed)
    canvases = versions.add(table, state, options, batch, facts, canvases)
    if facts.drafts:
        drafts = fan_out.canvases(table, state, options, batch, facts, drafting, text, breaks)
        canvases = fan_out.joined(drafting, drafts, canvases)
    denoised = Denoised(look, ahead, step, quota)
    return _plan_of(state, options, batch, facts, text, breaks, canvases, denoised)


def _plan_of(
    state: Canvas,
    options: Options,
    batch: Batch,
    facts: Facts,
    text: Tensor,
    breaks: Tensor,
    canvases: Canvases,
    denoised: Denoised | None,
) -> Plan:
    """The plan of a forward of `text` [B] columns, behind `breaks` [B] of which the text may go on,
    and `canvases`; None: none is denoised."""
    segments = lay_out(state, batch, facts, text, canvases)
    num_next, rows = needed_rows(options, batch, facts, segments, text, canvases)
    reads = text > 0
    if facts.prefills:
        reads |= batch.prompt_ends
    if denoised is None:
        nobody = torch.zeros_like(reads)
        denoised = Denoised(nobody, nobody, state.step, None)
    ends = None if breaks is text else breaks < text
    own = (state, options, segments, rows, num_next, canvases, text, ends, reads)
    return Plan(*own, **denoised._asdict())


def _plan_verified(
    table: CanvasTable,
    state: Canvas,
    options: Options,
    batch: Batch,
    facts: Facts,
    decodes: Tensor,
    count: Tensor,
) -> Plan:
    """The plan of a batch whose requests all draft while text is read or draft nothing, those that
    `decodes` [B] bool says now; `count` [B, L] int64: masked columns up to each one."""
    text = fan_out.text_of(table, state, options, batch, facts, count)
    text, breaks = _until_end(table, state, options, batch, facts, torch.where(decodes, text, 0))
    looks, verifies = facts.drafts, facts.verifies
    if not facts.static:
        # Behind a draft there may be no canvas; a token that is read alone is not verified.
        lengths = text.tolist()
        looks &= facts.fan_out > 0 or 1 in lengths
        verifies = max(lengths) > 1
    if looks:
        canvases = fan_out.canvases(table, state, options, batch, facts, decodes, text, breaks)
        looks = facts.static or bool(canvases.exists.any())
    if not looks:
        canvases = no_canvas(state)
    facts = facts._replace(looks=looks, verifies=verifies)
    return _plan_of(state, options, batch, facts, text, breaks, canvases, None)


def _until_end(
    table: CanvasTable, state: Canvas, options: Options, batch: Batch, facts: Facts, text: Tensor
) -> tuple[Tensor, Tensor]:
    """Of `text` [B] columns those that are read, and behind how many of them the text may go on,
    [B] int64 each: where text is verified, none behind the first token that ends its request."""
    positions = state.start[:, None] + table.columns
    last = table.is_last(batch.slot, options, state.tokens, positions)
    if not (facts.static or last.any()):
        return text, text
    before = torch.minimum((last.cumsum(1) == 0).sum(1), text)
    if facts.verifies:
        text = torch.where(options.verifies, torch.minimum(before + 1, text), text)
    return text, before


def fixed_columns(options: Options, start: Tensor) -> Tensor:
    """[B] int64: columns of canvases at `start` [B] that hold the tail of a prompt."""
    return (options.prompt_length - start).clamp(min=0)


def _quotas(options: Options, step: Tensor, num_masked: Tensor, facts: Facts) -> Tensor | None:
    """[B] int64: least number of columns that a step fills; None: 1."""
    if not facts.limits:
        return None
    quota = fill_quota(num_masked, (options.max_steps - step).clamp(min=1))
    if facts.splits:
        even = even_quota(options.block_length, options.max_steps, step)
        quota = torch.where(options.splits, even, quota)
    return quota


def _runs_ahead(
    state: Canvas, options: Options, batch: Batch, text: Tensor, facts: Facts
) -> Tensor:
    """[B] bool, requests whose next canvas is denoised in the forward that commits this one."""
    start = state.start + text
    width = width_at(options, start, facts)
    ahead = (
        (text > 0)
        & (width > 1)
        & (start <= options.last_position)
        & (start + width <= batch.room)
        & (text + width <= batch.max_rows)
    )
    # Of those that do not fuse a guess may be what another request left in their slot.
    ahead &= options.fuses
    return ahead & (state.guess != NO_TOKEN) if facts.guesses else ahead
