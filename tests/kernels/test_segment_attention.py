# SPDX-License-Identifier: Apache-2.0
"""Segment attention against its fp64 reference, in the interpreter."""

import pytest
import torch
from torch import Tensor
from vllm_nbdiff.kernels.attention_tile import tile_shape
from vllm_nbdiff.kernels.kv_parts import cut_keys, limits_of
from vllm_nbdiff.kernels.segment_attention import segment_attention

from tests.kernels.attention_cases import (
    Case,
    Segment,
    assert_as_good_as_eager,
    launch_for,
    make_case,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HOPPER = 227 * 1024


MIXED = [
    Segment(rows=37, kv_len=37, causal=1),  # prefill from nothing
    Segment(rows=13, kv_len=113, causal=1),  # a later chunk of a prefill
    Segment(rows=8, kv_len=72, causal=0),  # denoise
    Segment(rows=8, kv_len=61, causal=1),  # commit
    Segment(rows=1, kv_len=50, causal=1),  # AR decode
    Segment(rows=0, kv_len=0, causal=0),  # padding
    Segment(rows=1, kv_len=1, causal=0),  # one row, one key
]


@pytest.mark.parametrize("processors", [None, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_of_every_kind_in_one_call(dtype: torch.dtype, processors: int | None) -> None:
    case = make_case(MIXED, dtype, extra_rows=5)
    assert_as_good_as_eager(case, processors=processors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    segments = [Segment(9, 75, 1), Segment(5, 33, 0)]
    assert_as_good_as_eager(make_case(segments, dtype, head_dim=head_dim))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1), (20, 1)], ids=str)
def test_query_heads_per_kv_head(heads: tuple[int, int]) -> None:
    case = make_case([Segment(11, 40, 0), Segment(6, 6, 1)], torch.float16, heads)
    assert_as_good_as_eager(case)
    assert_as_good_as_eager(case, processors=9, max_query_len=11)


@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_page_sizes_with_a_partial_last_page(page_size: int) -> None:
    case = make_case([Segment(8, 59, 0), Segment(3, 101, 1)], page_size=page_size)
    assert_as_good_as_eager(case, processors=8)


@pytest.mark.parametrize("tiles", [1, 2])
def test_lengths_around_whole_tiles(tiles: int) -> None:
    """Where the unmasked tiles end: the last key, the first row's last key, just before, after."""
    edge = tiles * tile_shape(32, 2, max_query_len=5, itemsize=2, shared_memory=HOPPER).block_n
    lengths = range(edge - 1, edge + 2)
    bidirectional = [Segment(2, length, 0) for length in lengths]
    causal = [Segment(5, length + 4, 1) for length in lengths]
    assert_as_good_as_eager(make_case(bidirectional + causal, torch.float16), max_query_len=5)


def test_commit_fused_with_the_next_canvas() -> None:
    """Two segments of one request share pages: the old block causal, the new canvas on top."""
    page_table = torch.tensor([[3, 0, 5, 1]], dtype=torch.int32).expand(2, 4).contiguous()
    case = make_case([Segment(8, 48, 1), Segment(8, 56, 0)], page_table=page_table)
    assert_as_good_as_eager(case)


def test_block_causal_prefill_is_one_segment_per_block() -> None:
    """n tokens in blocks of B: ceil(n / B) bidirectional segments with KV length (j + 1) B."""
    n, block = 45, 8
    ends = [min(start + block, n) for start in range(0, n, block)]
    lengths = [Segment(end - start, end, 0) for start, end in zip([0, *ends], ends, strict=False)]
    page_table = torch.tensor([[2, 0, 1]], dtype=torch.int32).expand(len(lengths), 3).contiguous()
    case = make_case(lengths, page_table=page_table)
    assert_as_good_as_eager(case)

    ours = segment_attention(*case, scale=case.scale)
    keys = torch.arange(n)
    k = case.k_cache[page_table[0, keys // 16].long(), keys % 16].repeat_interleave(2, dim=1)
    v = case.v_cache[page_table[0, keys // 16].long(), keys % 16].repeat_interleave(2, dim=1)
    mask = keys[None, :] // block <= keys[:, None] // block
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask
    )
    torch.testing.assert_close(ours, dense.transpose(0, 1))


def test_every_mask_of_block_diffusion_in_one_call() -> None:
    """Requests of one segment each, and of several that share their pages."""
    requests = [
        [Segment(37, 37, 1)],  # prefill
        [Segment(8, 61, 1)],  # commit
        [Segment(8, 72, 0)],  # denoise
        [Segment(8, 48, 1), Segment(8, 56, 0)],  # commit fused with the next block's first denoise
        [Segment(5, 53, 1), Segment(8, 61, 0)],  # 5 drafted tokens verified, the next ones drafted
        [Segment(8, end, 0) for end in range(8, 41, 8)] + [Segment(5, 45, 0)],  # in blocks of 8
        [Segment(6, 30, 0), Segment(3, 61, 0), Segment(1, 90, 0)],  # infilling, three windows
    ]
    pages = torch.randperm(len(requests) * 6).view(-1, 6).int()
    owner = [index for index, segments in enumerate(requests) for _ in segments]
    segments = [segment for request in requests for segment in request]
    assert_as_good_as_eager(make_case(segments, torch.bfloat16, page_table=pages[owner]))


def test_contexts_from_none_to_4096_in_one_call() -> None:
    contexts = [0, 1, 15, 16, 17, 511, 4096]
    segments = [Segment(2, context + 2, 0) for context in contexts]
    case = make_case(segments, heads=(2, 1))
    assert_as_good_as_eager(case, processors=16, max_query_len=2)


def test_257_requests() -> None:
    contexts = torch.randint(0, 14, (257,)).tolist()
    segments = [Segment(2, 2 + context, index % 2) for index, context in enumerate(contexts)]
    assert_as_good_as_eager(make_case(segments, heads=(2, 1)), max_query_len=2)


@pytest.mark.parametrize("processors", [None, 132])
def test_long_context(processors: int | None) -> None:
    """One that is cut into many parts, beside one that stays whole."""
    case = make_case([Segment(4, 4099, 0), Segment(2, 3, 1)], torch.float16, heads=(2, 1))
    assert_as_good_as_eager(case, processors=processors, max_query_len=4)


def test_parts_that_rows_do_not_see() -> None:
    """The first rows of a prompt see none of the last parts, which must not be read."""
    assert_as_good_as_eager(make_case([Segment(300, 300, 1)], heads=(2, 1)), processors=400)


def test_partial_results_that_fill_their_room() -> None:
    case = make_case([Segment(4, 200, 0)], heads=(2, 1))
    launch = launch_for(case)
    limits = limits_of(launch.tile, 2, 1, num_processors=16, itemsize=4)
    parts = cut_keys(case.segments, limits._replace(part_cost=0, room=2))
    assert parts.starts[-1].tolist() == [2, 2, 1]
    ours = segment_attention(*case, scale=case.scale, launch=launch._replace(parts=parts))
    whole = segment_attention(*case, scale=case.scale, launch=launch)
    torch.testing.assert_close(ours, whole)


def test_a_row_without_keys_is_zero() -> None:
    case = make_case([Segment(4, 2, 1)])
    for processors in (None, 4):
        launch = launch_for(case, processors)
        ours = segment_attention(*case, scale=case.scale, launch=launch, check_values=False)
        assert (ours[:2] == 0).all()
        assert ours[2:].isfinite().all() and (ours[2:] != 0).any()


def test_empty_batches() -> None:
    case = make_case([Segment(2, 2, 0)])
    empty = case._replace(q=case.q[:0])
    assert segment_attention(*empty, scale=1.0, check_values=False).shape == (0, 4, 32)


def test_writes_into_out() -> None:
    case = make_case([Segment(5, 20, 0)])
    out = torch.empty(5, 6, 32)[:, 1:5]
    result = segment_attention(*case, scale=case.scale, out=out)
    assert result is out
    torch.testing.assert_close(out, segment_attention(*case, scale=case.scale))


def test_typical_canvas_shares_one_pass_over_kv() -> None:
    """NBDiff-7B: 32 rows x 4 query heads per KV head are one tile."""
    assert tile_shape(128, 4, max_query_len=32, itemsize=2, shared_memory=HOPPER).block_m == 128


def test_more_stages_where_they_fit() -> None:
    """In 227 KiB of an H200 or B200, in 163 of an A100, not in 99 of an L4."""

    def stages(rows: int, kib: int, head_dim: int = 128) -> int:
        return tile_shape(head_dim, 4, rows, itemsize=2, shared_memory=kib * 1024).num_stages

    assert [stages(32, kib) for kib in (227, 163, 99)] == [5, 5, 3]
    assert [stages(32, kib, head_dim=256) for kib in (227, 163, 99)] == [5, 5, 3]
    assert [stages(1, kib) for kib in (227, 163, 99)] == [5, 5, 3]
    assert stages(1, 99, head_dim=64) == 5


def _with(case: Case, **fields: Tensor) -> Case:
    return case._replace(segments=case.segments._replace(**fields))


def test_wrong_arguments_are_named() -> None:
    case = make_case([Segment(4, 20, 1), Segment(4, 30, 0)])
    table = case.segments
    bad = {
        "q": case._replace(q=case.q[:, :3]),
        "k_cache": case._replace(k_cache=case.k_cache.half()),
        "v_cache": case._replace(v_cache=case.v_cache[:-1]),
        "query_start": _with(case, query_start=table.query_start[:-1]),
        "kv_len": _with(case, kv_len=table.kv_len.long()),
        "causal": _with(case, causal=table.causal.bool()),
        "page_table": _with(case, page_table=table.page_table[0]),
    }
    for argument, wrong in bad.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            segment_attention(*wrong, scale=1.0)
    with pytest.raises(ValueError, match=r"^out: "):
        segment_attention(*case, scale=1.0, out=case.q[:4])


def test_scale_must_be_positive() -> None:
    case = make_case([Segment(4, 20, 1)])
    with pytest.raises(ValueError, match=r"^scale: "):
        segment_attention(*case, scale=0.0)


def test_impossible_values_are_named() -> None:
    case = make_case([Segment(4, 20, 1), Segment(4, 30, 0)])
    table = case.segments
    bad = {
        "query_start": {"query_start": torch.tensor([0, 4, 9], dtype=torch.int32)},
        "kv_len": {"kv_len": torch.tensor([3, 30], dtype=torch.int32)},
        "causal": {"causal": torch.tensor([1, 2], dtype=torch.int32)},
        "page_table": {"page_table": table.page_table + 2},
    }
    for argument, fields in bad.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            segment_attention(*_with(case, **fields), scale=1.0, check_values=True)
    with pytest.raises(ValueError, match=r"^page_table: "):
        segment_attention(
            *_with(case, page_table=table.page_table - 10), scale=1.0, check_values=True
        )
    with pytest.raises(ValueError, match=r"^kv_len: exceeds"):
        too_long = torch.tensor([20, 33], dtype=torch.int32)
        segment_attention(*_with(case, kv_len=too_long), scale=1.0, check_values=True)
