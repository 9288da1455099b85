# SPDX-License-Identifier: Apache-2.0
"""The segments of a forward: runs of rows that see the same tokens of their own request.

Where the context is causal, text is one causal segment. Where it is block-causal, every block of a
prompt is a bidirectional segment, and so is a canvas that is committed; the tail of a prompt that
ends inside a block is left out, as its KV would not be final: it is part of the first canvas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vllm_nbdiff.decoding.canvas import Canvas
from vllm_nbdiff.decoding.indices import indices

if TYPE_CHECKING:
    from vllm_nbdiff.decoding.plan import Batch, Facts


class Canvases(NamedTuple):
    """C canvases of each request that a forward looks at, [B, C] each."""

    tokens: Tensor  # [B, C, L] int64
    active: Tensor  # [B, C, L] bool, columns that are predicted
    exists: Tensor  # bool
    start: Tensor  # int64, position of column 0
    width: Tensor  # int64, columns in use
    low: Tensor  # int64, first column that is computed
    high: Tensor  # int64, the one behind the last that is computed
    seen: Tensor  # int64, the one behind the last whose KV is seen
    moved: Tensor  # int64, pages by which its pages lie behind those where text belongs


def own_canvas(
    tokens: Tensor,
    active: Tensor,
    exists: Tensor,
    start: Tensor,
    width: Tensor,
    computed: tuple[Tensor, Tensor] | None,
) -> Canvases:
    """One canvas a request, where its text belongs: [B, L] and [B] in place of a C of 1.

    Args:
        computed: [B] int64 each, first column that is, and the one behind the last; None: all are.
    """
    tokens, active, exists = tokens.unsqueeze(1), active.unsqueeze(1), exists.unsqueeze(1)
    start, width = start.unsqueeze(1), width.unsqueeze(1)
    here = torch.zeros_like(width)
    low, high = (here, width) if computed is None else (own.unsqueeze(1) for own in computed)
    return Canvases(tokens, active, exists, start, width, low, high, width, here)


def no_canvas(state: Canvas) -> Canvases:
    """What stands for canvases where none is looked at."""
    active = torch.zeros_like(state.tokens, dtype=torch.bool)
    return own_canvas(state.tokens, active, active[:, 0], state.start, state.width, None)


class Segments(NamedTuple):
    """[B, S] each, in the order of a request's rows."""

    first: Tensor  # int64, absolute position of the first row
    length: Tensor  # int64, rows; 0: not used
    kv_length: Tensor  # int64, tokens whose KV is seen
    causal: Tensor  # bool, else every row sees all `kv_length` tokens
    moved: Tensor  # int64, pages by which the rows' pages lie behind those where text belongs
    tokens: Tensor  # [B, S, L] int64, canvas of the segment
    base: Tensor  # int64, absolute position of its column 0


def lay_out(
    state: Canvas, batch: Batch, facts: Facts, text: Tensor, canvases: Canvases
) -> Segments:
    """Segments for the text, then one for each canvas; or one in all.

    Args:
        state: of the canvases before the forward.
        batch: the scheduled requests.
        facts: of the batch.
        text: [B] int64, columns of the state's canvas that are text.
        canvases: that are looked at.
    """
    tokens, _, exists, start, _, low, high, _, moved = canvases
    block_causal, block = facts.family.block_causal, tokens.shape[2]
    text_start, text_rows = state.start, text
    if facts.prefills:
        text_start = torch.where(batch.decodes, state.start, batch.computed)
        prompt = batch.scheduled
        if block_causal:
            prompt = (batch.computed + prompt) // block * block - batch.computed
        text_rows = torch.where(batch.decodes, text, prompt)
    if not facts.looks:
        first, length = text_start[:, None], text_rows[:, None]
        causal = torch.full_like(length, not block_causal, dtype=torch.bool)
        return Segments(first, length, first + length, causal, moved, tokens, start)
    looked = (high - low) * exists
    # With the block cache the KV of columns that are not computed is seen as well.
    seen = start + canvases.seen
    if not facts.texts:
        causal = torch.zeros_like(exists)
        return Segments(start + low, looked, seen, causal, moved, tokens, start)
    reads = text_rows > 0
    if facts.exclusive:
        causal = torch.zeros_like(reads) if block_causal else reads
        return Segments(
            first=torch.where(reads[:, None], text_start[:, None], start + low),
            length=torch.where(reads[:, None], text_rows[:, None], looked),
            kv_length=torch.where(reads[:, None], (text_start + text_rows)[:, None], seen),
            causal=causal[:, None],
            moved=moved,
            tokens=tokens,
            base=start,
        )
    first, length = text_start[:, None], text_rows[:, None]
    if facts.blocks > 1:
        begin = indices(facts.blocks, text.device) * block
        length = (length - begin).clamp(0, block)
        first = first + torch.minimum(begin, text_rows[:, None])

    base = state.start[:, None].expand_as(first)
    texts = torch.stack([first, length, first + length, base])
    others = torch.stack([start + low, looked, seen, start])
    first, length, kv_length, base = torch.cat([texts, others], dim=2).unbind()
    is_text = indices(first.shape[1], first.device) < (0 if block_causal else facts.blocks)
    return Segments(
        first=first,
        length=length,
        kv_length=kv_length,
        causal=is_text.expand_as(first),
        moved=torch.nn.functional.pad(moved, (facts.blocks, 0)),
        tokens=torch.cat([state.tokens[:, None].expand(-1, facts.blocks, -1), tokens], dim=1),
        base=base,
    )
