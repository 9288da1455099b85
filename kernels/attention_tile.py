# SPDX-License-Identifier: Apache-2.0
"""An attention program: its launch shape, which depends on no KV length, the segment it works on,
and its inner step: a tile of keys into the running softmax of a tile of query rows.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from .tuned_tiles import NOT_TUNED, TileKind, TileShape

SCRATCH = 2048  # bytes of shared memory for barriers and reductions, at most


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Type of the matrix products' operands: the input's own, but the interpreter has no bf16."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
    }[dtype]


def tile_shape(
    head_dim: int,
    group: int,
    max_query_len: int,
    itemsize: int,
    shared_memory: int,
    tuned: Mapping[TileKind, TileShape] = NOT_TUNED,
) -> TileShape:
    """Tile for `max_query_len` query rows x `group` heads: at most 128 rows share a pass over KV.

    The bounds keep a program within the registers of an SM and its `shared_memory` bytes; fp32
    products run out of registers instead of on tensor cores and take smaller tiles. What is `tuned`
    goes before.
    """
    wanted = triton.next_power_of_2(group * max_query_len)
    most = 32 if itemsize == 4 else 128
    block_m = max(16, triton.next_power_of_2(group), min(most, wanted))
    if tile := tuned.get(TileKind(head_dim, block_m, itemsize)):
        return tile
    if itemsize == 4:
        return TileShape(block_m, block_n=16, num_warps=8, num_stages=2)
    block_n = 64 if head_dim <= 128 else 32
    row = triton.next_power_of_2(head_dim) * itemsize
    fits = _rows_held(block_m, block_n, 5) * row + SCRATCH <= shared_memory
    num_warps, num_stages = 8 if block_m >= 128 else 4, 5 if fits else 3
    held = resident(head_dim, itemsize, (block_m, block_n, num_warps, num_stages), shared_memory)
    return TileShape(block_m, block_n, num_warps, num_stages, held)


def _rows_held(block_m: int, block_n: int, num_stages: int) -> int:
    """Of queries, keys and values, that a program has in shared memory, at most."""
    # Loads of page ids take half of the pipeline: 5 stages are three buffers of K and V for tensor
    # cores that read shared memory and two for others, 3 are one less (`compile_report.py` counts).
    return block_m + (num_stages + 1) // 2 * 2 * block_n


def resident(
    head_dim: int, itemsize: int, shape: tuple[int, int, int, int], shared_memory: int
) -> int:
    """Programs of that shape, (block_m, block_n, num_warps, num_stages), that an SM holds at a
    time, at least: its registers have room for 8 warps of the longest ones."""
    block_m, block_n, num_warps, num_stages = shape
    row = triton.next_power_of_2(head_dim) * itemsize
    own = _rows_held(block_m, block_n, num_stages) * row + SCRATCH
    return max(1, min(8 // num_warps, shared_memory // own))


@triton.jit
def find_segment(query_start_ptr, num_segments, block, BLOCK_Q: tl.constexpr):  # type: ignore[no-untyped-def]
    """The segment that owns query block `block`, when segment s owns the blocks from
    query_start[s] // BLOCK_Q + s on: room for a partial block each, known without reading lengths.
    """
    low = 0
    high = num_segments
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def find_last(starts_ptr, STRIDE: tl.constexpr, count, index):  # type: ignore[no-untyped-def]
    """The last of `count` ascending starts, `STRIDE` elements apart, that is at most `index`; the
    first one is 0."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle * STRIDE) <= index:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def accumulate(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    n,
    visible,
    scale_log2,
    top,
    total,
    acc,
    WEIGHT_DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys into the running softmax; unmasked when every row sees every key."""
    scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee")
    if MASKED:
        scores = tl.where(n[None, :] < visible[:, None], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
    shift = new_top
    if MASKED:  # a row that sees no key yet keeps top = -inf; subtracting it would give NaN
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(weights, axis=1)
    weights = weights.to(WEIGHT_DTYPE).to(q.dtype)
    acc = tl.dot(weights, v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc
