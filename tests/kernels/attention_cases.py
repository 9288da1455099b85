# SPDX-License-Identifier: Apache-2.0
"""Random segments over a paged cache, and how exact attention over them must be."""

from typing import NamedTuple

import torch
from torch import Tensor
from vllm_nbdiff.kernels.attention_launch import AttentionLaunch, attention_launch
from vllm_nbdiff.kernels.kv_parts import cut_keys, limits_of
from vllm_nbdiff.kernels.kv_scales import KVScales
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.segment_attention_reference import segment_attention_reference
from vllm_nbdiff.kernels.segment_table import SegmentTable

UNTOUCHED = 7.0


class Segment(NamedTuple):
    rows: int
    kv_len: int
    causal: int


class Case(NamedTuple):
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    segments: SegmentTable

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


def make_case(
    segments: list[Segment],
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    page_size: int = 16,
    extra_rows: int = 0,
    page_table: Tensor | None = None,
) -> Case:
    """Random inputs; pages no segment uses, page tails and extra rows hold NaN."""
    rows = torch.tensor([segment.rows for segment in segments])
    kv_len = torch.tensor([segment.kv_len for segment in segments], dtype=torch.int32)
    width = max(1, -(-int(kv_len.max()) // page_size))
    if page_table is None:
        page_table = torch.randperm(len(segments) * width).view(len(segments), width).int()
    num_pages = int(page_table.max()) + 2

    # vLLM keeps K and V of a page side by side and hands out the two halves as strided views.
    cache = torch.full((num_pages, 2, page_size, heads[1], head_dim), torch.nan)
    for row, length in enumerate(kv_len.tolist()):
        keys = torch.arange(length)
        place = (page_table[row, keys // page_size].long(), slice(None), keys % page_size)
        cache[place] = torch.randn(length, 2, heads[1], head_dim)
    k_cache, v_cache = cache.to(dtype).unbind(1)

    total = int(rows.sum())
    q = torch.full((total + extra_rows, heads[0], head_dim), torch.nan)
    q[:total] = torch.randn(total, heads[0], head_dim)
    start = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int()
    causal = torch.tensor([segment.causal for segment in segments], dtype=torch.int32)
    return Case(q.to(dtype), k_cache, v_cache, SegmentTable(start, kv_len, causal, page_table))


def launch_for(
    case: Case, processors: int | None = None, max_query_len: int | None = None
) -> AttentionLaunch:
    """Keys cut for so many processors, as if parts cost nothing: short ones too; None: not cut."""
    num_kv_heads, itemsize = case.k_cache.shape[2], case.k_cache.element_size()
    inputs = case.q, case.k_cache, case.segments
    launch = attention_launch(*inputs, max_query_len=max_query_len, max_kv_len=1)
    if processors is None:
        return launch
    group = case.q.shape[1] // num_kv_heads
    limits = limits_of(launch.tile, group, num_kv_heads, processors, itemsize)
    return launch._replace(parts=cut_keys(case.segments, limits._replace(part_cost=0)))


def assert_as_good_as_eager(
    case: Case,
    kv_scales: KVScales | None = None,
    processors: int | None = None,
    max_query_len: int | None = None,
) -> None:
    """The kernel's error against fp64 is at most twice that of eager PyTorch in the input dtype;
    rows of no segment are left as they were. Keys are cut for so many processors, or not.
    """
    used = int(case.segments.query_start[-1])
    options = {"scale": case.scale, "kv_scales": kv_scales}
    exact = segment_attention_reference(*case, **options)[:used]
    eager = segment_attention_reference(*case, **options, compute_dtype=case.q.dtype)[:used]
    out = torch.full_like(case.q, UNTOUCHED)
    launch = launch_for(case, processors, max_query_len)
    ours = segment_attention(*case, **options, out=out, launch=launch)
    assert (ours[used:] == UNTOUCHED).all()
    bound = 2 * (eager.double() - exact).abs().max()
    assert (ours[:used].double() - exact).abs().max() <= bound
