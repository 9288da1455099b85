# SPDX-License-Identifier: Apache-2.0
"""How keys are cut: the kernel against its reference, and both against simulated processors."""

import heapq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_nbdiff.kernels.attention_launch import attention_launch
from vllm_nbdiff.kernels.attention_tile import tile_shape
from vllm_nbdiff.kernels.kv_parts import (
    MOST_PARTS,
    SLACK,
    KVParts,
    Limits,
    cut_keys,
    cut_keys_reference,
    limits_of,
)
from vllm_nbdiff.kernels.segment_table import SegmentTable

from tests.kernels.attention_cases import Segment, make_case

HOPPER = 227 * 1024
CANVAS = limits_of(tile_shape(128, 4, 32, 2, HOPPER), 4, 8, num_processors=132, itemsize=2)


def table_of(segments: list[tuple[int, int]]) -> SegmentTable:
    """Of rows and KV lengths."""
    rows, kv_len = torch.tensor(segments, dtype=torch.int32).T.contiguous()
    starts = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int()
    return SegmentTable(starts, kv_len, torch.zeros_like(kv_len), kv_len[:, None])


def counted(segments: list[tuple[int, int]], parts: KVParts, limits: Limits) -> list[int]:
    """Parts of each segment, whose programs and results lie one behind another."""
    numbers, result, cut = [], 0, 0
    starts = parts.starts.tolist()
    for (rows, _), own, following in zip(segments, starts, starts[1:], strict=False):
        blocks = -(-rows // limits.block_q)
        programs = following[0] - own[0]
        assert own[1:] == [result, cut]
        number = programs // blocks if blocks else 0
        assert programs == number * blocks and (number or not blocks)
        numbers.append(number)
        result += programs if number > 1 else 0
        cut += blocks if number > 1 else 0
    assert starts[0] == [0, 0, 0] and starts[-1][1:] == [result, cut]
    assert result <= parts.room == limits.room and cut <= parts.room // 2
    return numbers


def seconds(segments: list[tuple[int, int]], numbers: list[int], limits: Limits) -> int:
    """Until the last program ends, in tiles, where each starts in its turn as another ends."""
    ends = [0] * limits.num_slots
    for (rows, kv_len), number in zip(segments, numbers, strict=True):
        tiles = max(1, -(-kv_len // limits.block_n))
        length = -(-tiles // max(1, number)) + (limits.part_cost if number > 1 else 0)
        for _ in range(-(-rows // limits.block_q) * number * limits.num_kv_heads):
            heapq.heappush(ends, heapq.heappop(ends) + length)
    return max(ends)


SEGMENTS = st.lists(
    st.tuples(st.sampled_from([0, 1, 3, 8, 40, 200]), st.integers(0, 700)), min_size=1, max_size=150
)
LIMITS = st.builds(
    Limits,
    st.sampled_from([1, 3, 8]),
    st.sampled_from([16, 64]),
    st.integers(0, 4),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 7, 132]),
    st.sampled_from([2, 17, 66]),
)


@settings(max_examples=40)
@given(SEGMENTS, LIMITS)
def test_kernel_cuts_as_its_reference(segments: list[tuple[int, int]], limits: Limits) -> None:
    table = table_of(segments)
    ours, expected = cut_keys(table, limits), cut_keys_reference(table, limits)
    assert torch.equal(ours.starts, expected.starts) and ours.room == expected.room
    counted(segments, ours, limits)


@settings(max_examples=40)
@given(SEGMENTS, LIMITS)
def test_no_cut_that_has_room_is_faster_by_its_bound(
    segments: list[tuple[int, int]], limits: Limits
) -> None:
    """What was chosen ends before what is promised of any other number, and the slack."""
    found = counted(segments, cut_keys_reference(table_of(segments), limits), limits)
    tiles = [max(1, -(-kv_len // limits.block_n)) for _, kv_len in segments]
    blocks = [-(-rows // limits.block_q) for rows, _ in segments]
    longest = max((t for t, b in zip(tiles, blocks, strict=True) if b), default=1)
    bounds = []
    for number in range(1, MOST_PARTS + 1):
        length = -(-longest // number)
        numbers = [-(-t // length) if b else 0 for t, b in zip(tiles, blocks, strict=True)]
        pairs = list(zip(numbers, blocks, strict=True))
        if sum(n * b for n, b in pairs if n > 1) > limits.room:
            continue
        length += limits.part_cost if number > 1 else 0
        programs = sum(n * b for n, b in pairs) * limits.num_kv_heads
        bounds.append(-(-programs // limits.num_slots) * length)
        assert seconds(segments, numbers, limits) <= bounds[-1]
    best = min(bounds)
    assert seconds(segments, found, limits) <= best + best // SLACK


@pytest.mark.parametrize(
    ("lengths", "number"),
    [
        ([32768], 15),  # with 8 KV heads 120 programs, on 132 processors
        ([8192] * 8, 2),  # 128
        ([8192] * 132, 1),
        ([256], 1),
    ],
)
def test_equal_lengths(lengths: list[int], number: int) -> None:
    segments = [(32, length) for length in lengths]
    assert counted(segments, cut_keys(table_of(segments), CANVAS), CANVAS) == [number] * len(
        lengths
    )


def test_one_long_context_among_short_ones() -> None:
    """Of 128 requests one has 32768 tokens: whole, that one takes 3 times as long as an equal share
    of the work; cut, it does not hold up the others, which stay whole."""
    segments = [(32, 1024)] * 127 + [(32, 32768)]
    numbers = counted(segments, cut_keys(table_of(segments), CANVAS), CANVAS)
    assert numbers[:-1] == [1] * 127 and numbers[-1] > 4
    share = sum(-(-length // 64) for _, length in segments) * 8 / 132
    assert seconds(segments, [1] * 128, CANVAS) > 3 * share
    assert seconds(segments, numbers, CANVAS) < 1.4 * share


def test_few_keys_are_not_cut() -> None:
    case = make_case([Segment(8, 60, 0)], torch.bfloat16, heads=(8, 2), head_dim=128)

    def cuts(max_kv_len: int) -> bool:
        inputs = case.q, case.k_cache, case.segments
        launch = attention_launch(*inputs, max_query_len=32, max_kv_len=max_kv_len)
        return launch.parts is not None

    # Of a tile of 64 keys and 128 rows a part costs as much as 4 tiles.
    assert [cuts(512), cuts(513)] == [False, True]
