# SPDX-License-Identifier: Apache-2.0
"""Split-KV attention: how many parts to cut the keys into, and the kernel that joins the parts."""

import functools

import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 32
# A part shorter than this costs more in partial results written than it saves in waiting.
MIN_KEYS_PER_SPLIT = 256
# Fewer parts are taken over the best wave occupancy when they reach this share of it.
GOOD_ENOUGH = 0.9


@functools.cache
def choose_kv_splits(num_programs: int, max_kv_len: int, num_processors: int) -> int:
    """Parts per segment that fill the processors' last wave, from host-known sizes only.

    With p programs over m processors the share of busy processor-waves is p / (m ceil(p / m)); the
    smallest number of parts within `GOOD_ENOUGH` of the best share is taken.

    Args:
        num_programs: query tiles times KV heads, the programs of an unsplit launch.
        max_kv_len: upper bound of the segments' KV lengths, in tokens.
        num_processors: streaming multiprocessors.
    """
    most = min(MAX_SPLITS, max(1, max_kv_len // MIN_KEYS_PER_SPLIT))

    def occupancy(splits: int) -> float:
        programs = num_programs * splits
        return programs / (num_processors * triton.cdiv(programs, num_processors))

    best = max(occupancy(splits) for splits in range(1, most + 1))
    return next(s for s in range(1, most + 1) if occupancy(s) >= GOOD_ENOUGH * best)


@triton.jit(do_not_specialize=["num_segments", "num_splits"])
def _combine_splits_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    partial_ptr,
    lse_ptr,
    query_start_ptr,
    num_segments,
    num_splits,
    stride_out_token,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    if token >= tl.load(query_start_ptr + num_segments):
        return
    split = tl.arange(0, BLOCK_SPLITS)
    dim = tl.arange(0, BLOCK_D)
    row = (token * tl.num_programs(1) + head) * num_splits

    lse = tl.load(lse_ptr + row + split, mask=split < num_splits, other=-float("inf"))
    largest = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(largest == -float("inf"), 0.0, largest))
    total = tl.sum(weight, axis=0)
    # Parts without keys (lse = -inf) wrote no partial result, so none may be read.
    mask = (lse > -float("inf"))[:, None] & (dim < HEAD_DIM)[None, :]
    offsets = (row + split)[:, None] * HEAD_DIM + dim[None, :]
    partial = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    out = tl.sum(weight[:, None] * partial, axis=0) / tl.where(total == 0.0, 1.0, total)
    out_row = out_ptr + token * stride_out_token + head * stride_out_head
    tl.store(out_row + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def combine_splits(out: Tensor, partial: Tensor, lse: Tensor, query_start: Tensor) -> None:
    """Join the parts of split-KV attention: out = sum_s 2^(lse_s - lse) partial_s.

    Args:
        out: [num_tokens, num_q_heads, head_dim]; rows below `query_start[-1]` are written.
        partial: [num_tokens, num_q_heads, splits, head_dim] fp32, each part normalised by itself.
        lse: [num_tokens, num_q_heads, splits] fp32, base-2 log of each part's softmax denominator;
            -inf for a part without keys, whose `partial` is not read.
        query_start: [segments + 1] int32.
    """
    num_tokens, num_q_heads, num_splits, head_dim = partial.shape
    _combine_splits_kernel[(num_tokens, num_q_heads)](
        out,
        partial,
        lse,
        query_start,
        query_start.shape[0] - 1,
        num_splits,
        *out.stride()[:2],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SPLITS=triton.next_power_of_2(num_splits),
        num_warps=2,
    )
