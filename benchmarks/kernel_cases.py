# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.kernels` times: each kernel and its contenders on the shapes of a denoise step.

A case is made of results that agree: making it runs every contender once and raises AssertionError
where one is wrong.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from vllm_nbdiff.kernels.row_sample import row_sample
from vllm_nbdiff.kernels.row_statistics import row_statistics
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.segment_attention_reference import segment_attention_reference
from vllm_nbdiff.kernels.segment_table import SegmentTable
from vllm_nbdiff.kernels.write_kv import write_kv

from benchmarks.canvases import THRESHOLD, Canvases
from benchmarks.timing import Run
from vllm_nbdiff.decoding.sampling import Drawn


@dataclass(frozen=True)
class Shapes:
    """One denoise step of a model: per request `block` query rows and `sub_block` logit rows."""

    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    block: int
    sub_block: int
    page_size: int
    dtype: torch.dtype
    device: str

    def kv_bytes(self, requests: int, context: int) -> int:
        """Of one layer, the canvas included."""
        per_token = 2 * self.kv_heads * self.head_dim * self.dtype.itemsize
        return requests * (context + self.block) * per_token


NBDIFF_7B = Shapes(32, 8, 128, 153376, 32, 8, 16, torch.bfloat16, "cuda")
TOY = Shapes(4, 2, 32, 1021, 8, 4, 16, torch.float32, "cpu")


@dataclass(frozen=True)
class Case:
    """Contenders for one job; the first is ours."""

    kernel: str
    requests: int
    context: int
    num_bytes: int
    contenders: dict[str, Run]


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def int32(values: object, device: str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def vllm_is_usable(shapes: Shapes) -> bool:
    return shapes.device == "cuda" and importlib.util.find_spec("vllm") is not None


def vllm_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: SegmentTable, scale: float, longest: int
) -> Run:
    """vLLM's Triton unified attention, bidirectional."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(q)

    def run() -> Tensor:
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


def attention_case(shapes: Shapes, requests: int, context: int) -> Case:
    """A canvas per request over `context` committed tokens, its own KV included in kv_len."""
    s, device = shapes, shapes.device
    kv_len = context + s.block
    pages = triton.cdiv(kv_len, s.page_size)
    cache_shape = (requests * pages, 2, s.page_size, s.kv_heads, s.head_dim)
    k_cache, v_cache = torch.randn(cache_shape, dtype=s.dtype, device=device).unbind(1)
    page_table = torch.randperm(requests * pages, device=device).view(requests, pages)
    q = torch.randn(requests * s.block, s.q_heads, s.head_dim, dtype=s.dtype, device=device)
    table = SegmentTable(
        int32(torch.arange(requests + 1) * s.block, device),
        int32([kv_len] * requests, device),
        int32([0] * requests, device),
        int32(page_table, device),
    )
    scale = s.head_dim**-0.5

    def gathered(cache: Tensor) -> Tensor:
        rows = cache[page_table].flatten(1, 2)[:, :kv_len]
        return rows.transpose(1, 2).contiguous()

    def ours() -> Tensor:
        return segment_attention(
            q, k_cache, v_cache, table, scale=scale, max_query_len=s.block, max_kv_len=kv_len
        )

    keys, values = gathered(k_cache), gathered(v_cache)
    dense_q = q.view(requests, s.block, s.q_heads, s.head_dim).transpose(1, 2)
    contenders: dict[str, Run] = {"ours": ours, **dense_attention(dense_q, keys, values)}
    if vllm_is_usable(shapes):
        contenders["vllm triton"] = vllm_attention(q, k_cache, v_cache, table, scale, kv_len)

    last = SegmentTable(int32([0, s.block], device), *(field[-1:] for field in table[1:]))
    inputs = (q[-s.block :], k_cache, v_cache, last)
    exact = segment_attention_reference(*inputs, scale=scale)
    eager = segment_attention_reference(*inputs, scale=scale, compute_dtype=s.dtype)
    bound = 2 * (eager.double() - exact).abs().max()
    for name, run in contenders.items():
        error = (run()[-s.block :].double() - exact).abs().max()  # type: ignore[index]
        assert error <= bound, f"{name}: error {error:.3g} of the last request, bound {bound:.3g}"
    return Case("segment_attention", requests, context, size_of(keys, values, q, q), contenders)


def write_case(shapes: Shapes, requests: int) -> Case:
    s, tokens = shapes, requests * shapes.block
    slots = torch.randperm(tokens, device=s.device)
    key, value = torch.randn(2, tokens, s.kv_heads, s.head_dim, dtype=s.dtype, device=s.device)
    pages = triton.cdiv(tokens, s.page_size)
    cache_shape = (2, pages, s.page_size, s.kv_heads, s.head_dim)
    cache = torch.zeros(cache_shape, dtype=s.dtype, device=s.device)
    flat = cache.view(2, pages * s.page_size, s.kv_heads, s.head_dim)

    def indexed() -> None:
        flat[0].index_copy_(0, slots, key)
        flat[1].index_copy_(0, slots, value)

    def ours() -> None:
        write_kv(key, value, cache[0], cache[1], slots)

    indexed()
    expected = cache.clone()
    cache.zero_()
    ours()
    assert torch.equal(cache, expected), "write_kv differs from index_copy_"
    contenders: dict[str, Run] = {"ours": ours, "index_copy_": indexed}
    return Case("write_kv", requests, 0, 2 * size_of(key, value), contenders)


def statistics_case(shapes: Shapes, requests: int, logits: Tensor) -> Case:
    def eager() -> tuple[Tensor, Tensor, Tensor]:
        log_p = logits.float().log_softmax(dim=-1)
        p = log_p.exp()
        top = p.topk(2, dim=-1)
        return top.indices[:, 0], top.values, -(p * log_p).sum(dim=-1)

    def ours() -> object:
        return row_statistics(logits)

    contenders: dict[str, Run] = {"ours": ours, "eager fp32": eager}
    _, best, entropy = eager()
    found = row_statistics(logits)
    torch.testing.assert_close(found.probability, best[:, 0], atol=0, rtol=1e-4)
    torch.testing.assert_close(found.margin, best[:, 0] - best[:, 1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.entropy, entropy, atol=0, rtol=1e-4)
    if vllm_is_usable(shapes):
        from vllm.model_executor.models.diffusion_gemma_sampler import sample_row_stats

        temperature = torch.ones(requests, device=shapes.device)

        def vllm() -> tuple[Tensor, ...]:
            return sample_row_stats(logits, temperature, shapes.sub_block, 0, None)

        torch.testing.assert_close(vllm()[2], entropy, atol=0, rtol=1e-4)
        contenders["vllm row kernel (with a draw)"] = vllm
    return Case("row_statistics", requests, 0, size_of(logits), contenders)


def sample_case(requests: int, logits: Tensor) -> Case:
    rows, device = len(logits), logits.device
    key = {
        "draw": torch.rand(rows, dtype=torch.float64, device=device),
        "temperature": torch.ones(rows, device=device),
    }
    top_p = torch.full((rows,), 0.9, device=device)

    def eager() -> Tensor:
        return logits.float().softmax(dim=-1).multinomial(1)

    drawn = row_sample(logits, **key)
    p = logits.float().softmax(dim=-1).gather(-1, drawn.token.long()[:, None])[:, 0]
    torch.testing.assert_close(drawn.probability, p, atol=0, rtol=1e-4)
    draws: dict[str, Run] = {
        "ours": lambda: row_sample(logits, **key),
        "ours, top-p 0.9": lambda: row_sample(logits, **key, top_p=top_p),
        "eager fp32 multinomial": eager,
    }
    return Case("row_sample", requests, 0, size_of(logits), draws)


def decisions_case(shapes: Shapes, requests: int) -> Case:
    """What a step decides beside its forward and draws: PyTorch's launches, no kernel of ours."""
    s, mask_token_id = shapes, 1
    tokens = torch.full((requests, s.block), mask_token_id, device=s.device)
    tokens[:, : s.sub_block] = 2
    canvases = Canvases(tokens, 0, s.sub_block, s.vocab_size, mask_token_id)
    p = torch.rand((requests, s.sub_block), device=s.device)
    token = torch.randint(2, s.vocab_size, p.shape, device=s.device)
    drawn = Drawn(token.flatten(), p.flatten(), p.flatten())

    def ours() -> Tensor:
        return canvases.decide(canvases.plan(), drawn).tokens

    expected = tokens.clone()
    taken = (p > THRESHOLD) | (p == p.amax(dim=1, keepdim=True))
    expected[:, s.sub_block : 2 * s.sub_block] = torch.where(taken, token, mask_token_id)
    assert torch.equal(ours(), expected), "decisions: other positions than the likeliest are filled"
    return Case("decisions", requests, 0, size_of(tokens, tokens, *drawn), {"ours": ours})


def other_cases(shapes: Shapes, requests: int) -> Iterator[Case]:
    """Those whose work does not depend on the context."""
    rows = requests * shapes.sub_block
    logits = torch.randn(rows, shapes.vocab_size, dtype=shapes.dtype, device=shapes.device) * 3
    yield write_case(shapes, requests)
    yield statistics_case(shapes, requests, logits)
    yield sample_case(requests, logits)
    yield decisions_case(shapes, requests)
