# SPDX-License-Identifier: Apache-2.0
"""Attention as `benchmarks.kernels` and `benchmarks.tune` time it: canvases over paged KV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from vllm_nbdiff.kernels.attention_launch import attention_launch
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.segment_attention_reference import segment_attention_reference
from vllm_nbdiff.kernels.segment_table import SegmentTable
from vllm_nbdiff.kernels.tuned_tiles import TileShape

from benchmarks.kernel_cases import (
    Case,
    Contender,
    Shapes,
    int32,
    paged_cache,
    size_of,
    vllm_is_usable,
)
from benchmarks.timing import Run


def vllm_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: SegmentTable, scale: float, longest: int
) -> Run:
    """vLLM's Triton unified attention, bidirectional."""
    out = torch.empty_like(q)

    def run() -> Tensor:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        unified_attention(
            q=q,
            k=k_cache,
            v=v_cache,
            out=out,
            cu_seqlens_q=table.query_start,
            max_seqlen_q=q.shape[0] // table.num_segments,
            seqused_k=table.kv_len,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=False,
            window_size=(-1, -1),
            block_table=table.page_table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        return out

    return run


def dense_attention(q: Tensor, keys: Tensor, values: Tensor) -> dict[str, Run]:
    """PyTorch's own on [N, heads, rows, dim]; FlexAttention compiled where it is meant to be."""
    torch.compiler.reset()  # every case has its own shapes, and dynamo keeps a few only
    flex: Any = torch.compile(flex_attention) if q.device.type == "cuda" else flex_attention

    def as_rows(out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(0, 1)

    return {
        "sdpa, KV gathered beforehand": lambda: as_rows(
            F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        ),
        "flex attention, KV gathered beforehand": lambda: as_rows(
            flex(q, keys, values, enable_gqa=True)
        ),
    }


class Batch(NamedTuple):
    """A canvas per request over committed tokens, its own KV included in `kv_len`."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    table: SegmentTable

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, SegmentTable]:
        return self.q, self.k_cache, self.v_cache, self.table

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


def batch_of(shapes: Shapes, contexts: list[int], rows: int) -> Batch:
    """Requests of `rows` query rows each behind so many committed tokens."""
    s, device, count = shapes, shapes.device, len(contexts)
    kv_len = [context + rows for context in contexts]
    pages = triton.cdiv(max(kv_len), s.page_size)
    used = sum(triton.cdiv(length, s.page_size) for length in kv_len)
    k_cache, v_cache = paged_cache(s, used)
    order = torch.randperm(used).split([triton.cdiv(length, s.page_size) for length in kv_len])
    page_table = torch.stack([F.pad(own, (0, pages - len(own))) for own in order])
    q = torch.randn(count * rows, s.q_heads, s.head_dim, dtype=s.dtype, device=device)
    table = SegmentTable(
        int32(torch.arange(count + 1) * rows, device),
        int32(kv_len, device),
        int32([0] * count, device),
        int32(page_table, device),
    )
    return Batch(q, k_cache, v_cache, table)


def check_of(batch: Batch, rows: int) -> Callable[[Tensor], None]:
    """Of what attention gives the last request's `rows`: at most twice the error of eager."""
    starts = int32([0, rows], str(batch.q.device))
    last = SegmentTable(starts, *(field[-1:] for field in batch.table[1:]))
    inputs = (batch.q[-rows:], batch.k_cache, batch.v_cache, last)
    exact = segment_attention_reference(*inputs, scale=batch.scale)
    dtype = batch.q.dtype
    eager = segment_attention_reference(*inputs, scale=batch.scale, compute_dtype=dtype)
    bound = 2 * (eager.double() - exact).abs().max()

    def check(out: Tensor) -> None:
        error = (out[-rows:].double() - exact).abs().max()
        assert error <= bound, f"error {error:.3g} of the last request, bound {bound:.3g}"

    return check


def our_attention(
    batch: Batch, rows: int, longest: int, tile: TileShape | None = None
) -> Callable[[], Tensor]:
    """As the first layer of a forward runs it, in tiles of that shape if given."""
    inputs = batch.q, batch.k_cache, batch.table

    def run() -> Tensor:
        bounds = {"max_query_len": rows, "max_kv_len": longest}
        launch = attention_launch(*inputs, **bounds, tile=tile)
        return segment_attention(*batch.inputs, scale=batch.scale, launch=launch)

    return run


def attention_case(shapes: Shapes, requests: int, context: int) -> Case:
    """Requests of one length each."""
    s, kv_len = shapes, context + shapes.block
    batch = batch_of(s, [context] * requests, s.block)
    page_table = batch.table.page_table.long()

    def gathered(cache: Tensor) -> Tensor:
        rows = cache[page_table].flatten(1, 2)[:, :kv_len]
        return rows.transpose(1, 2).contiguous()

    keys, values = gathered(batch.k_cache), gathered(batch.v_cache)
    dense_q = batch.q.view(requests, s.block, s.q_heads, s.head_dim).transpose(1, 2)
    ours = our_attention(batch, s.block, kv_len)
    runs: dict[str, Run] = {"ours": ours, **dense_attention(dense_q, keys, values)}
    if vllm_is_usable(shapes):
        runs["vllm triton"] = vllm_attention(*batch.inputs, batch.scale, kv_len)
    check = check_of(batch, s.block)
    contenders = {name: Contender(run, check) for name, run in runs.items()}
    size = size_of(keys, values, batch.q, batch.q)
    return Case("segment_attention", requests, context, size, contenders)


def uneven_case(shapes: Shapes, requests: int, context: int) -> Case:
    """One request of that length beside others of a 32nd of it."""
    s = shapes
    contexts = [context // 32] * (requests - 1) + [context]
    batch, longest = batch_of(s, contexts, s.block), context + s.block
    runs: dict[str, Run] = {"ours": our_attention(batch, s.block, longest)}
    if vllm_is_usable(shapes):
        runs["vllm triton"] = vllm_attention(*batch.inputs, batch.scale, longest)
    check = check_of(batch, s.block)
    contenders = {name: Contender(run, check) for name, run in runs.items()}
    size = sum(s.kv_bytes(1, length) for length in contexts) + size_of(batch.q, batch.q)
    return Case("segment_attention, one long", requests, context, size, contenders)
