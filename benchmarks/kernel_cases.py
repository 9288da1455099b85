# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.kernels` times: each kernel and its contenders on the shapes of a denoise step;
attention is in `attention_cases`.

Each contender comes with a check of its result, which raises AssertionError where that is wrong.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from vllm_nbdiff.kernels.row_sample import RowSample, row_sample
from vllm_nbdiff.kernels.row_statistics import RowStatistics, row_statistics
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


class Contender(NamedTuple):
    run: Run
    check: Callable[[Any], None] = lambda result: None
    """Of what it returned; the default is of those that the others are compared with."""


@dataclass(frozen=True)
class Case:
    """Contenders for one job; those that are ours have names that begin with it."""

    kernel: str
    requests: int
    context: int
    num_bytes: int
    contenders: dict[str, Contender]


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def int32(values: object, device: str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def paged_cache(shapes: Shapes, pages: int) -> tuple[Tensor, Tensor]:
    """Random keys and values [pages, page_size, kv_heads, head_dim], laid out as in the engine."""
    s = shapes
    shape = (pages, s.kv_heads, s.page_size, 2 * s.head_dim)
    cache = torch.randn(shape, dtype=s.dtype, device=s.device)
    keys, values = cache.transpose(1, 2).split(s.head_dim, dim=-1)
    return keys, values


def vllm_is_usable(shapes: Shapes) -> bool:
    return shapes.device == "cuda" and importlib.util.find_spec("vllm") is not None


def write_case(shapes: Shapes, requests: int) -> Case:
    s, tokens = shapes, requests * shapes.block
    slots = torch.randperm(tokens, device=s.device)
    key, value = torch.randn(2, tokens, s.kv_heads, s.head_dim, dtype=s.dtype, device=s.device)
    page, offset = slots // s.page_size, slots % s.page_size
    caches = [paged_cache(s, triton.cdiv(tokens, s.page_size)) for _ in range(2)]

    def ours() -> None:
        write_kv(key, value, *caches[0], slots)

    def indexed() -> None:
        for cache, rows in zip(caches[1], (key, value), strict=True):
            cache[page, offset] = rows

    def check(index: int) -> None:
        for cache, rows in zip(caches[index], (key, value), strict=True):
            assert torch.equal(cache[page, offset], rows), "other keys or values than were written"

    contenders = {
        "ours": Contender(ours, lambda result: check(0)),
        "index_put_": Contender(indexed, lambda result: check(1)),
    }
    return Case("write_kv", requests, 0, 2 * size_of(key, value), contenders)


def statistics_case(shapes: Shapes, requests: int, logits: Tensor) -> Case:
    def eager() -> tuple[Tensor, Tensor, Tensor]:
        log_p = logits.float().log_softmax(dim=-1)
        p = log_p.exp()
        top = p.topk(2, dim=-1)
        return top.indices[:, 0], top.values, -(p * log_p).sum(dim=-1)

    _, best, entropy = eager()

    def check(found: RowStatistics) -> None:
        torch.testing.assert_close(found.probability, best[:, 0], atol=0, rtol=1e-4)
        torch.testing.assert_close(found.margin, best[:, 0] - best[:, 1], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.entropy, entropy, atol=0, rtol=1e-4)

    def vllm() -> tuple[Tensor, ...]:
        from vllm.model_executor.models.diffusion_gemma_sampler import sample_row_stats

        return sample_row_stats(logits, temperature, shapes.sub_block, 0, None)

    def check_entropy(found: tuple[Tensor, ...]) -> None:
        torch.testing.assert_close(found[2], entropy, atol=0, rtol=1e-4)

    contenders = {
        "ours": Contender(lambda: row_statistics(logits), check),
        "eager fp32": Contender(eager),
    }
    if vllm_is_usable(shapes):
        temperature = torch.ones(requests, device=shapes.device)
        contenders["vllm row kernel (with a draw)"] = Contender(vllm, check_entropy)
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

    def check(drawn: RowSample) -> None:
        p = logits.float().softmax(dim=-1).gather(-1, drawn.token.long()[:, None])[:, 0]
        torch.testing.assert_close(drawn.probability, p, atol=0, rtol=1e-4)

    draws = {
        "ours": Contender(lambda: row_sample(logits, **key), check),
        "ours, top-p 0.9": Contender(lambda: row_sample(logits, **key, top_p=top_p)),
        "eager fp32 multinomial": Contender(eager),
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

    def check(found: Tensor) -> None:
        assert torch.equal(found, expected), "other positions than the likeliest are filled"

    contenders = {"ours": Contender(ours, check)}
    return Case("decisions", requests, 0, size_of(tokens, tokens, *drawn), contenders)


def other_cases(shapes: Shapes, requests: int) -> Iterator[Case]:
    """Those whose work does not depend on the context."""
    rows = requests * shapes.sub_block
    logits = torch.randn(rows, shapes.vocab_size, dtype=shapes.dtype, device=shapes.device) * 3
    yield write_case(shapes, requests)
    yield statistics_case(shapes, requests, logits)
    yield sample_case(requests, logits)
    yield decisions_case(shapes, requests)
