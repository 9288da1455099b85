# SPDX-License-Identifier: Apache-2.0
"""Split-KV attention: into how many parts the keys of each segment are cut, and who computes them.

Decided on the device, from the lengths that are there: a CUDA graph is replayed with others, and
one long context among short ones is cut while these stay whole.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_table import SegmentTable
from .tuned_tiles import TileShape

MOST_PARTS = 128
# Partial results there is room for, in waves of programs.
MOST_WAVES = 4
# Fewer parts are taken where they take at most a ninth longer than the best number.
SLACK = 9


class KVParts(NamedTuple):
    """Programs of a split launch. Those of a segment come one after another: the parts of its first
    query block, those of the next one, and so on."""

    starts: Tensor
    """[segments + 1, 3] int32: programs, partial results, and query blocks cut into several parts,
    before each segment; all of them last. Of one KV head."""
    room: int
    """Partial results there may be, of one KV head."""


class Limits(NamedTuple):
    """What a cut depends on beside the lengths."""

    block_q: int  # query rows of a program
    block_n: int  # keys of a tile
    part_cost: int  # tiles whose keys and values are as many bytes as a part's result, both ways
    num_kv_heads: int
    num_slots: int  # programs that run at a time
    room: int  # partial results there may be, of one KV head


def limits_of(
    tile: TileShape, group: int, num_kv_heads: int, num_processors: int, itemsize: int
) -> Limits:
    """Those of an attention launch.

    Args:
        tile: of its programs.
        group: query heads of a KV head.
        num_kv_heads: KV heads.
        num_processors: streaming multiprocessors.
        itemsize: bytes of an element of the KV cache.
    """
    cost = triton.cdiv(4 * tile.block_m, tile.block_n * itemsize)
    slots = num_processors * tile.resident
    room = max(2, triton.cdiv(MOST_WAVES * slots, num_kv_heads))
    return Limits(tile.block_m // group, tile.block_n, cost, num_kv_heads, slots, room)


@triton.jit
def _work_of(  # type: ignore[no-untyped-def]
    query_start_ptr, kv_len_ptr, segment, num_segments, block_q, block_n
):
    """Query blocks of segments, and tiles of keys of each block: one at least."""
    there = segment < num_segments
    start = tl.load(query_start_ptr + segment, mask=there, other=0)
    stop = tl.load(query_start_ptr + segment + 1, mask=there, other=0)
    kv_len = tl.load(kv_len_ptr + segment, mask=there, other=0)
    return tl.cdiv(stop - start, block_q), tl.maximum(tl.cdiv(kv_len, block_n), 1)


@triton.jit(
    do_not_specialize=[
        *("num_segments", "block_q", "block_n", "part_cost"),
        *("num_kv_heads", "num_slots", "room", "slack"),
    ]
)
def _cut_keys_kernel(  # type: ignore[no-untyped-def]
    starts_ptr,
    query_start_ptr,
    kv_len_ptr,
    num_segments,
    block_q,
    block_n,
    part_cost,
    num_kv_heads,
    num_slots,
    room,
    slack,
    MOST_PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_S)
    longest = 1
    for first in range(0, num_segments, BLOCK_S):
        blocks, tiles = _work_of(
            query_start_ptr, kv_len_ptr, first + lane, num_segments, block_q, block_n
        )
        longest = tl.maximum(longest, tl.max(tl.where(blocks > 0, tiles, 1), axis=0))

    number = tl.arange(0, MOST_PARTS) + 1
    length = tl.cdiv(longest, number)
    programs = tl.zeros([MOST_PARTS], tl.int32)
    results = tl.zeros([MOST_PARTS], tl.int32)
    total = 0
    for first in range(0, num_segments, BLOCK_S):
        blocks, tiles = _work_of(
            query_start_ptr, kv_len_ptr, first + lane, num_segments, block_q, block_n
        )
        parts = tl.cdiv(tiles[None, :], length[:, None])
        of_segment = parts * blocks[None, :]
        programs += tl.sum(of_segment, axis=1)
        results += tl.sum(tl.where(parts > 1, of_segment, 0), axis=1)
        total += tl.sum(blocks * tiles, axis=0)
    longest_program = length + tl.where(number > 1, part_cost, 0)
    waves = tl.cdiv(programs * num_kv_heads, num_slots) * longest_program
    work = (total + results * part_cost) * num_kv_heads
    time = tl.minimum(waves, tl.cdiv(work, num_slots) + longest_program)
    best = tl.min(tl.where(results <= room, time, 2147483647), axis=0)
    # The more parts, the more results: fewer parts than the best number have room too.
    good = time <= best + best // slack
    chosen = tl.cdiv(longest, tl.min(tl.where(good, number, MOST_PARTS), axis=0))

    program = 0
    result = 0
    cut_block = 0
    for first in range(0, num_segments, BLOCK_S):
        blocks, tiles = _work_of(
            query_start_ptr, kv_len_ptr, first + lane, num_segments, block_q, block_n
        )
        parts = tl.cdiv(tiles, chosen)
        own = parts * blocks
        own_results = tl.where(parts > 1, own, 0)
        own_blocks = tl.where(parts > 1, blocks, 0)
        row = starts_ptr + (first + lane) * 3
        there = first + lane < num_segments
        tl.store(row, program + tl.cumsum(own, axis=0) - own, mask=there)
        tl.store(row + 1, result + tl.cumsum(own_results, axis=0) - own_results, mask=there)
        tl.store(row + 2, cut_block + tl.cumsum(own_blocks, axis=0) - own_blocks, mask=there)
        program += tl.sum(own, axis=0)
        result += tl.sum(own_results, axis=0)
        cut_block += tl.sum(own_blocks, axis=0)
    last = starts_ptr + num_segments * 3
    tl.store(last, program)
    tl.store(last + 1, result)
    tl.store(last + 2, cut_block)


def cut_keys(segments: SegmentTable, limits: Limits) -> KVParts:
    """Cut the keys of the longest segment into some number of parts, and all others into parts no
    longer than these, in one launch of which nothing is read back.

    Of all numbers the smallest is taken that is nearly the fastest. Programs start as others end:
    a launch takes no longer than whole waves of the longest program, nor than an equal share of the
    work and once the longest program (R. L. Graham, Bounds on multiprocessing timing anomalies,
    1969).

    Args:
        segments: the segment table.
        limits: of the attention launch.
    """
    shape = (segments.num_segments + 1, 3)
    starts = torch.empty(shape, dtype=torch.int32, device=segments.kv_len.device)
    _cut_keys_kernel[(1,)](
        starts,
        segments.query_start,
        segments.kv_len,
        segments.num_segments,
        *limits,
        SLACK,
        MOST_PARTS=MOST_PARTS,
        BLOCK_S=64,
        num_warps=8,
    )
    return KVParts(starts, limits.room)


def cut_keys_reference(segments: SegmentTable, limits: Limits) -> KVParts:
    """Plain PyTorch `cut_keys`."""
    block_q, block_n, part_cost, heads, slots, room = limits
    blocks = -(-segments.query_start.diff().long() // block_q)
    tiles = (-(-segments.kv_len.long() // block_n)).clamp(min=1)
    longest = torch.where(blocks > 0, tiles, 1).max()

    def counts(number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Programs, partial results and blocks that are cut, [numbers, segments] each."""
        parts = -(-tiles // (-(-longest // number))[:, None])
        cut = torch.where(parts > 1, blocks, 0)
        return parts * blocks, parts * cut, cut

    number = torch.arange(1, MOST_PARTS + 1, device=blocks.device)
    programs, results, _ = (count.sum(1) for count in counts(number))
    longest_program = -(-longest // number) + torch.where(number > 1, part_cost, 0)
    waves = -(-programs * heads // slots) * longest_program
    work = ((blocks * tiles).sum() + results * part_cost) * heads
    time = torch.minimum(waves, -(-work // slots) + longest_program)
    best = time[results <= room].min()
    chosen = number[time <= best + best // SLACK][:1]
    ends = torch.cat(counts(chosen)).cumsum(1).T
    starts = torch.nn.functional.pad(ends, (0, 0, 1, 0))
    return KVParts(starts.int(), room)
