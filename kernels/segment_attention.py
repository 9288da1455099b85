# SPDX-License-Identifier: Apache-2.0
"""Attention of segments over a paged KV cache, with grouped query heads and split KV."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_launch import AttentionLaunch, attention_launch
from .attention_tile import accumulate, dot_dtype, find_last, find_segment
from .combine_parts import combine_parts
from .kv_scales import KVScales, check_kv_scales
from .segment_table import SegmentTable
from .validation import (
    FLOAT_DTYPES,
    once_per_layout,
    require,
    require_tensor,
    values_are_checked,
)

LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["num_segments", "stride_page_row"])
def _segment_attention_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    partial_ptr,
    lse_ptr,
    starts_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    query_start_ptr,
    kv_len_ptr,
    causal_ptr,
    page_table_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale_log2,
    num_segments,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    stride_page_row,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    HAS_KV_SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    program = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)

    parts = 1
    part = 0
    result = 0
    if SPLIT:
        segment = find_last(starts_ptr, 3, num_segments, program)
    else:
        segment = find_segment(query_start_ptr, num_segments, program, BLOCK_Q)
    start = tl.load(query_start_ptr + segment)
    rows = tl.load(query_start_ptr + segment + 1) - start
    if SPLIT:
        own = starts_ptr + segment * 3
        own_start = tl.load(own)
        own_program = program - own_start
        # A segment without rows has no programs.
        parts = (tl.load(own + 3) - own_start) // tl.maximum(tl.cdiv(rows, BLOCK_Q), 1)
        parts = tl.maximum(parts, 1)
        part = own_program % parts
        result = tl.load(own + 1) + own_program
        first = own_program // parts * BLOCK_Q
    else:
        first = (program - start // BLOCK_Q - segment) * BLOCK_Q
    if first >= rows:
        return
    kv_len = tl.load(kv_len_ptr + segment)
    causal = tl.load(causal_ptr + segment)

    # Row m of the tile is query row m // GROUP under query head m % GROUP of this KV head.
    m = tl.arange(0, BLOCK_M)
    query = first + m // GROUP
    q_head = kv_head * GROUP + m % GROUP
    token = (start + query).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    row_mask = (m < BLOCK_Q * GROUP) & (query < rows)
    dim_mask = dim < HEAD_DIM
    q_row = q_ptr + token * stride_q_token + q_head * stride_q_head
    q = tl.load(
        q_row[:, None] + dim[None, :], mask=row_mask[:, None] & dim_mask[None, :], other=0.0
    )
    q = q.to(DOT_DTYPE)
    if HAS_KV_SCALES:
        scale_log2 *= tl.load(k_scale_ptr)

    visible = tl.where(causal != 0, kv_len - rows + query + 1, kv_len)
    last_row = tl.minimum(first + BLOCK_Q, rows) - 1
    kv_end = tl.where(causal != 0, kv_len - rows + last_row + 1, kv_len)
    tiles_of_part = tl.cdiv(tl.cdiv(kv_len, BLOCK_N), parts)
    first_tile = part * tiles_of_part
    last_tile = tl.minimum(first_tile + tiles_of_part, tl.cdiv(kv_end, BLOCK_N))

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_head = k_ptr + kv_head * stride_k_head
    v_head = v_ptr + kv_head * stride_v_head
    page_row = page_table_ptr + segment.to(tl.int64) * stride_page_row
    # Whole tiles of keys that all rows see need no mask; the first row sees the fewest.
    seen_by_all = tl.where(causal != 0, kv_len - rows + first + 1, kv_len)
    masked_from = tl.maximum(first_tile, tl.minimum(last_tile, seen_by_all // BLOCK_N))
    for MASKED in tl.static_range(2):
        begin = masked_from if MASKED else first_tile
        end = last_tile if MASKED else masked_from
        for tile in range(begin, end):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            n_mask = n < kv_end
            if PAGE_SIZE % BLOCK_N == 0:  # one page holds the tile
                first_key = tile * BLOCK_N
                page = tl.load(page_row + first_key // PAGE_SIZE).to(tl.int64)
                slot = first_key % PAGE_SIZE + tl.arange(0, BLOCK_N)
            else:
                page = tl.load(page_row + n // PAGE_SIZE, mask=n_mask, other=0).to(tl.int64)
                slot = n % PAGE_SIZE
            kv_mask = n_mask[:, None] & dim_mask[None, :]
            k_row = k_head + page * stride_k_page + slot * stride_k_slot
            k = tl.load(k_row[:, None] + dim[None, :], mask=kv_mask, other=0.0)
            v_row = v_head + page * stride_v_page + slot * stride_v_slot
            v = tl.load(v_row[:, None] + dim[None, :], mask=kv_mask, other=0.0)
            top, total, acc = accumulate(
                q,
                k,
                v,
                n,
                visible,
                scale_log2,
                top,
                total,
                acc,
                q_ptr.dtype.element_ty,
                MASKED,
            )

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if HAS_KV_SCALES:
        out *= tl.load(v_scale_ptr)
    out_row = out_ptr + token * stride_out_token + q_head * stride_out_head
    out_mask = row_mask[:, None] & dim_mask[None, :]
    if parts > 1:
        place = (tl.cast(result, tl.int64) * tl.num_programs(1) + kv_head) * BLOCK_M + m
        lse = top + tl.log2(tl.where(total == 0.0, 1.0, total))
        tl.store(lse_ptr + place, lse, mask=row_mask)
        seen = out_mask & (total > 0.0)[:, None]
        tl.store(partial_ptr + place[:, None] * HEAD_DIM + dim[None, :], out, mask=seen)
    else:
        tl.store(out_row[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)


@once_per_layout
def _check_layout(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    segments: SegmentTable,
    scale: float,
    out: Tensor,
    kv_scales: KVScales | None,
) -> None:
    device = q.device
    require_tensor("q", q, (None, None, None), FLOAT_DTYPES, device)
    num_q_heads, head_dim = q.shape[1:]
    require(scale > 0, "scale", f"{scale} is not positive")
    require(head_dim >= 16, "q", f"head_dim {head_dim}, the smallest supported is 16")
    dtype = check_kv_scales(kv_scales, k_cache, q.dtype, device)
    require_tensor("k_cache", k_cache, (None, None, None, head_dim), (dtype,), device)
    require_tensor("v_cache", v_cache, tuple(k_cache.shape), (dtype,), device)
    num_kv_heads = k_cache.shape[2]
    divides = num_kv_heads > 0 and num_q_heads % num_kv_heads == 0
    require(divides, "q", f"{num_q_heads} heads are no multiple of {num_kv_heads} KV heads")
    require_tensor("out", out, tuple(q.shape), (q.dtype,), device)
    segments.check_layout(device)


def segment_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    segments: SegmentTable,
    *,
    scale: float,
    launch: AttentionLaunch | None = None,
    out: Tensor | None = None,
    kv_scales: KVScales | None = None,
    check_values: bool | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of every segment's rows over its pages, in one kernel, or two where
    keys are cut into parts.

    Launch shapes follow from tensor shapes and host numbers alone, so a call can be captured in a
    CUDA graph and replayed with other segments. Accumulates in fp32.

    Args:
        q: [num_tokens, num_q_heads, head_dim] fp16, bf16 or fp32, last dimension contiguous.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], q's dtype or, with
            `kv_scales`, fp8 e4m3; any strides with a contiguous last dimension. The KV of all rows
            is already in place.
        segments: the segment table, int32 on q's device.
        scale: positive factor of the scores, usually head_dim ** -0.5.
        launch: `attention_launch` of these tensors, which serves all layers of a forward (default:
            without knowing bounds).
        out: like q; allocated when None. Rows at and after `query_start[-1]` are not written.
        kv_scales: factors of an fp8 cache.
        check_values: read the table back and check it (a device synchronisation); None checks on
            CPU only.

    Returns:
        out: [num_tokens, num_q_heads, head_dim].

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong.
    """
    out = torch.empty_like(q) if out is None else out
    _check_layout(q, k_cache, v_cache, segments, scale, out, kv_scales)
    num_tokens, num_q_heads, head_dim = q.shape
    if values_are_checked(check_values, q.device):
        segments.check_values(num_tokens, *k_cache.shape[:2])
    page_size, num_kv_heads = k_cache.shape[1:3]
    if num_tokens == 0 or segments.num_segments == 0:
        return out
    group = num_q_heads // num_kv_heads
    tile, parts = launch or attention_launch(q, k_cache, segments)
    programs = num_tokens // (tile.block_m // group) + segments.num_segments
    partial = lse = starts = out
    if parts is not None:
        programs += parts.room
        starts = parts.starts
        results = (parts.room, num_kv_heads, tile.block_m)
        partial = torch.empty((*results, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty(results, dtype=torch.float32, device=q.device)
    _segment_attention_kernel[(programs, num_kv_heads)](
        out,
        partial,
        lse,
        starts,
        q,
        k_cache,
        v_cache,
        segments.query_start,
        segments.kv_len,
        segments.causal,
        segments.page_table,
        *(kv_scales or (q, q)),  # not read unless HAS_KV_SCALES
        scale * LOG2_E,
        segments.num_segments,
        *q.stride()[:2],
        *out.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        segments.page_table.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim),
        DOT_DTYPE=dot_dtype(q.dtype),
        HAS_KV_SCALES=kv_scales is not None,
        SPLIT=parts is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if parts is not None:
        combine_parts(out, partial, lse, parts, segments)
    return out
