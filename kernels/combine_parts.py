# SPDX-License-Identifier: Apache-2.0
"""Split-KV attention: the kernel that joins the parts into which keys were cut."""

import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import find_last
from .kv_parts import KVParts
from .segment_table import SegmentTable

_ROWS = 16  # of a tile of queries, of each program


@triton.jit(do_not_specialize=["num_segments"])
def _combine_parts_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    partial_ptr,
    lse_ptr,
    starts_ptr,
    query_start_ptr,
    num_segments,
    stride_out_token,
    stride_out_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    cut_block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    if cut_block >= tl.load(starts_ptr + num_segments * 3 + 2):
        return
    segment = find_last(starts_ptr + 2, 3, num_segments, cut_block)
    row = starts_ptr + segment * 3
    block = cut_block - tl.load(row + 2)
    start = tl.load(query_start_ptr + segment)
    rows = tl.load(query_start_ptr + segment + 1) - start
    parts = (tl.load(row + 3) - tl.load(row)) // tl.cdiv(rows, BLOCK_Q)
    first_result = (tl.load(row + 1) + block * parts).to(tl.int64)

    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    query = block * BLOCK_Q + m // GROUP
    row_mask = (m < BLOCK_Q * GROUP) & (query < rows)
    dim_mask = dim < HEAD_DIM
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for part in range(parts):
        place = ((first_result + part) * tl.num_programs(1) + kv_head) * BLOCK_M + m
        lse = tl.load(lse_ptr + place, mask=row_mask, other=-float("inf"))
        # Parts without keys (lse = -inf) wrote no result, so none may be read.
        mask = (lse > -float("inf"))[:, None] & dim_mask[None, :]
        value = tl.load(
            partial_ptr + place[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0
        )
        new_top = tl.maximum(top, lse)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        decay, weight = tl.exp2(top - shift), tl.exp2(lse - shift)
        total = total * decay + weight
        acc = acc * decay[:, None] + value * weight[:, None]
        top = new_top
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = out_ptr + (start + query).to(tl.int64) * stride_out_token
    out_row += (kv_head * GROUP + m % GROUP) * stride_out_head
    tl.store(
        out_row[:, None] + dim[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & dim_mask[None, :],
    )


def combine_parts(
    out: Tensor, partial: Tensor, lse: Tensor, parts: KVParts, segments: SegmentTable
) -> None:
    """Join the parts of split-KV attention: out = sum_p 2^(lse_p - lse) partial_p.

    Args:
        out: [num_tokens, num_q_heads, head_dim]; rows of query blocks that were cut are written.
        partial: [room, num_kv_heads, block_m, head_dim] fp32, each part normalised by itself.
        lse: [room, num_kv_heads, block_m] fp32, base-2 log of each part's softmax denominator; -inf
            for a row that saw no key of it, whose `partial` is not read.
        parts: how keys were cut.
        segments: the segment table.
    """
    num_kv_heads, block_m, head_dim = partial.shape[1:]
    # What is cut has two parts at least.
    grid = (parts.room // 2, num_kv_heads, triton.cdiv(block_m, _ROWS))
    _combine_parts_kernel[grid](
        out,
        partial,
        lse,
        parts.starts,
        segments.query_start,
        segments.num_segments,
        *out.stride()[:2],
        GROUP=out.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_D=triton.next_power_of_2(head_dim),
        ROWS=_ROWS,
        num_warps=2,
    )
