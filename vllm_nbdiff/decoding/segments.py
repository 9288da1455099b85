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

if TYPE_CHECKING:
    from vllm_nbdiff.decoding.plan import Batch, Facts


class Segments(NamedTuple):
    """[B, S] each, in the order of a request's rows."""

    first: Tensor  # int64, absolute position of the first row
    length: Tensor  # int64, rows; 0: not used
    kv_length: Tensor  # int64, tokens whose KV is seen
    causal: Tensor  # bool, else every row sees all `kv_length` tokens
    version: Tensor  # int64, whose pages hold the rows; 0: where text belongs
    tokens: Tensor  # [B, S, L] int64, canvas of the segment
    base: Tensor  # int64, absolute position of its column 0


def lay_out(
    state: Canvas,
    batch: Batch,
    facts: Facts,
    text: Tensor,
    start: Tensor,
    width: Tensor,
    low: Tensor,
    high: Tensor,
    canvas: Tensor,
    exists: Tensor,
) -> Segments:
    """Segments for the text, then one for each canvas; or one in all.

    Args:
        state: of the canvases before the forward.
        batch: the scheduled requests.
        facts: of the batch.
        text: [B] int64, columns of the state's canvas that are text.
        start, width: [B] int64, of the canvas looked at.
        low, high: [B] int64, its columns that are computed.
        canvas: [B, C, L] int64, the canvas looked at and its versions.
        exists: [B, C] bool, whether it is looked at.
    """
    block_causal, block = facts.family.block_causal, canvas.shape[2]
    text_start, text_rows = state.start, text
    if facts.prefills:
        text_start = torch.where(batch.decodes, state.start, batch.computed)
        prompt = batch.scheduled
        if block_causal:
            prompt = (batch.computed + prompt) // block * block - batch.computed
        text_rows = torch.where(batch.decodes, text, prompt)
    reads = text_rows > 0
    if facts.exclusive:
        looks = exists[:, 0]
        look_rows = torch.where(looks, high - low, 0)
        causal = torch.zeros_like(reads) if block_causal else reads
        return Segments(
            first=torch.where(reads, text_start, start + low)[:, None],
            length=torch.where(reads, text_rows, look_rows)[:, None],
            kv_length=torch.where(reads, text_start + text_rows, start + width)[:, None],
            causal=causal[:, None],
            version=torch.zeros_like(text)[:, None],
            tokens=canvas,
            base=start[:, None],
        )
    levels = torch.arange(canvas.shape[1], device=canvas.device).expand(exists.shape)
    looked = torch.where(exists, (high - low)[:, None], 0)
    first, length = text_start[:, None], text_rows[:, None]
    if facts.blocks > 1:
        begin = torch.arange(facts.blocks, device=text.device) * block
        length = (length - begin).clamp(0, block)
        first = first + torch.minimum(begin, text_rows[:, None])

    def joined(texts: Tensor, others: Tensor) -> Tensor:
        return torch.cat([texts, others.expand(exists.shape)], dim=1)

    return Segments(
        first=joined(first, (start + low)[:, None]),
        length=joined(length, looked),
        kv_length=joined(first + length, (start + width)[:, None]),
        causal=joined(torch.full_like(length, not block_causal).bool(), torch.zeros_like(exists)),
        version=joined(torch.zeros_like(length), levels),
        tokens=torch.cat([state.tokens[:, None].expand(-1, facts.blocks, -1), canvas], dim=1),
        base=joined(state.start[:, None].expand_as(length), start[:, None]),
    )
