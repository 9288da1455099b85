# SPDX-License-Identifier: Apache-2.0
"""The block cache: within a sub-block, steps reuse the KV of the rest of the canvas."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_nbdiff.decoding.canvas import Canvas, Options
from vllm_nbdiff.decoding.indices import indices
from vllm_nbdiff.families.family import Family


def looked_columns(
    state: Canvas, options: Options, family: Family, active: Tensor, width: Tensor, current: Tensor
) -> tuple[Tensor, Tensor]:
    """Range of canvas columns [low, high) that a denoise step computes, [B] each.

    Of requests that reuse KV, only the active sub-block, once that of the whole canvas was written
    since the sub-block began (Fast-dLLM v2), and, so that each of its columns is predicted, the
    column before it; or it waits until its first column is filled.
    """
    size = options.sub_block_length
    begin = sub_block_begin(active, size)
    end = begin + size
    columns = indices(active.shape[1], active.device)
    beyond = (active & (columns >= end[:, None])).any(1)
    reuse = current & options.caches & ~beyond & (state.cached == begin)
    if family.cached_row_before:
        low = torch.where(reuse, (begin - 1).clamp(min=0), 0)
    else:
        if family.shifts:
            reuse &= ~active.gather(1, begin.clamp(max=active.shape[1] - 1)[:, None])[:, 0]
        low = torch.where(reuse, begin, 0)
    return low, torch.where(reuse, torch.minimum(end, width), width)


def sub_block_begin(active: Tensor, size: Tensor) -> Tensor:
    """[B] int64: first column of the sub-block that holds the first active one of [B, L]."""
    return (active.cumsum(1) == 0).sum(1) // size * size
