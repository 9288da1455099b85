# SPDX-License-Identifier: Apache-2.0
"""From what a forward may need to what it computes: rows of logits and rows of tokens.

Where shapes may depend on values, a CPU, only what is needed is computed. Where they may not, a
device with CUDA graphs, the host says how many rows there are and the rest is padding. Here
alone the two differ, but for work that a CPU leaves out where it sees that there is none, as
`Facts.of_forward` does and whatever else asks for `facts.static`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_nbdiff.decoding.indices import indices
from vllm_nbdiff.decoding.needed import Rows
from vllm_nbdiff.decoding.plan import Facts
from vllm_nbdiff.decoding.segments import Segments


class Packed(NamedTuple):
    """n rows of logits, those of a request one after another."""

    owner: Tensor  # [n] int64, batch index of the request
    place: Tensor  # [n] int64, which of the request's K rows; K: padding
    valid: Tensor | None  # [n] bool; None: all

    def of(self, values: Tensor) -> Tensor:
        """[n, ...]: the packed ones of `values` [B, K, ...]; padding has the last one's."""
        return values[self.owner, self.place.clamp(max=values.shape[1] - 1)]

    def spread(self, values: Tensor, num_reqs: int, count: int) -> Tensor:
        """[B, K]: `values` [n] where they belong, 0 elsewhere."""
        dense = values.new_zeros((num_reqs, count + 1))
        dense[self.owner, self.place] = values
        return dense[:, :count]


def pack(rows: Rows, facts: Facts) -> Packed:
    """The needed ones of [B, K] rows."""
    if not facts.static:
        owner, place = rows.needed.nonzero(as_tuple=True)
        return Packed(owner, place, None)
    num_reqs, count = rows.needed.shape
    device = rows.needed.device
    # The last column takes what is not needed.
    target = torch.where(rows.needed, rows.needed.cumsum(1) - 1, facts.rows).clamp(max=facts.rows)
    place = torch.full((num_reqs, facts.rows + 1), count, device=device)
    place.scatter_(1, target, indices(count, device).expand(num_reqs, count))
    place = place[:, :-1].flatten()
    owner = indices(num_reqs, device)
    owner = owner[:, None].expand(num_reqs, facts.rows).flatten()
    return Packed(owner, place, place < count)


class TokenRows(NamedTuple):
    """T rows of tokens, those of a request one after another, segment by segment."""

    owner: Tensor  # [T] int64, batch index of the request
    offset: Tensor  # [T] int64, row among those of the request
    segment: Tensor  # [T] int64, place in the flattened [B, S] segments
    position: Tensor  # [T] int64, absolute
    canvas: Tensor  # [T] int64, place in the flattened [B, S, L] canvases; not of prompts
    valid: Tensor | None  # [T] bool, not padding; None: all
    begin: Tensor  # [B] int, first row of each request

    def tokens(self, segments: Segments, prompt: Tensor | None, decodes: Tensor) -> Tensor:
        """[T] int64 token ids; `prompt` [T] holds those of prompts, None without any."""
        tokens = segments.tokens.flatten()[self.canvas]
        return tokens if prompt is None else torch.where(decodes[self.owner], tokens, prompt)


def token_rows(segments: Segments, given: tuple[Tensor, int] | None) -> TokenRows:
    """The rows of a forward.

    Args:
        segments: of the plan.
        given: [B + 1] int, where the rows of each request begin, and T, in which its segments
            come first and padding follows; None: as many as the segments have.
    """
    num_reqs, num_segments = segments.length.shape
    device = segments.length.device
    ends = segments.length.cumsum(1)
    if given is None:
        count = ends[:, -1]
        row_begin = count.cumsum(0) - count
        owner = indices(num_reqs, device).repeat_interleave(count)
        offset = torch.arange(len(owner), device=device) - row_begin[owner]
        valid = None
    else:
        start, total = given
        row, row_begin = torch.arange(total, device=device), start[:num_reqs]
        bounds = start[1 : num_reqs + 1].contiguous()
        owner = torch.searchsorted(bounds, row, right=True).clamp(max=num_reqs - 1)
        offset = row - start[owner]
        valid = offset < ends[owner, -1]
    segment, begin = owner, ends - segments.length
    if num_segments > 1:
        inside = (offset[:, None] >= ends[owner]).sum(1).clamp(max=num_segments - 1)
        segment = owner * num_segments + inside
    position = (segments.first - begin).flatten()[segment] + offset
    length = segments.tokens.shape[2]
    column = (position - segments.base.flatten()[segment]).clamp(0, length - 1)
    canvas = segment * length + column
    return TokenRows(owner, offset, segment, position, canvas, valid, row_begin)
