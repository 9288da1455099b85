# SPDX-License-Identifier: Apache-2.0
"""What `segment_attention` computes, in plain PyTorch."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .kv_scales import KVScales
from .segment_table import SegmentTable


def segment_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    segments: SegmentTable,
    *,
    scale: float,
    kv_scales: KVScales | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Plain PyTorch `segment_attention` in `compute_dtype`, one segment at a time.

    Returns:
        [num_tokens, num_q_heads, head_dim] in `compute_dtype`, zero where no segment owns a row.
    """
    out = torch.zeros(q.shape, dtype=compute_dtype, device=q.device)
    group = q.shape[1] // k_cache.shape[2]
    key_scale, value_scale = kv_scales or (1.0, 1.0)
    starts = segments.query_start.tolist()
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        rows, kv_len = stop - start, int(segments.kv_len[index])
        if rows == 0:
            continue
        key_index = torch.arange(kv_len, device=q.device)
        page = segments.page_table[index, key_index // k_cache.shape[1]].long()
        slot = key_index % k_cache.shape[1]
        keys = k_cache[page, slot].to(compute_dtype) * key_scale
        values = v_cache[page, slot].to(compute_dtype) * value_scale
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].to(compute_dtype), keys) * scale
        if segments.causal[index]:
            row = torch.arange(rows, device=q.device)
            hidden = key_index[None, :] > kv_len - rows + row[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)
    return out
