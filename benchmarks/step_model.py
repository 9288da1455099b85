# SPDX-License-Identifier: Apache-2.0
"""One denoise step of a model shaped like NBDiff-7B: random weights, PyTorch matrix products, this
project's kernels and decisions, nothing that depends on the host between first and last launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm_nbdiff.kernels.attention_launch import attention_launch
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.segment_table import SegmentTable
from vllm_nbdiff.kernels.write_kv import write_kv

from benchmarks.canvases import Canvases
from vllm_nbdiff.decoding.draws import draw_rows


@dataclass(frozen=True)
class ModelConfig:
    """A Llama with biases on q, k, v and o; per request `block` query rows, of which the
    `sub_block` that predict its second sub-block go through the head."""

    hidden_size: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block: int
    sub_block: int
    page_size: int
    dtype: torch.dtype
    device: str
    rope_theta: float = 1.6e7
    eps: float = 1e-5

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


# config.json of NBDiff-7B-Instruct and openPangu-Embedded-7B.
NBDIFF_7B = ModelConfig(4096, 34, 32, 8, 128, 12800, 153376, 32, 8, 16, torch.bfloat16, "cuda")
TOY = ModelConfig(48, 2, 4, 2, 16, 80, 211, 8, 4, 16, torch.float32, "cpu")


class Layer(NamedTuple):
    """Weights [outputs, inputs] of one layer; those that share an input are one matrix."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    o: Tensor
    o_bias: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Weights(NamedTuple):
    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Tensor

    def bytes_read(self) -> int:
        """By one forward; of the embedding it gathers a few rows."""
        tensors = [self.norm, self.head, *(tensor for layer in self.layers for tensor in layer)]
        return sum(tensor.nbytes for tensor in tensors)


def random_weights(config: ModelConfig) -> Weights:
    """Matrices that keep the scale of their input, norms around 1, small biases."""
    c, kv_size = config, config.kv_heads * config.head_dim
    q_size = c.q_heads * c.head_dim

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, dtype=c.dtype, device=c.device).normal_(std=std)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return normal(outputs, inputs, std=inputs**-0.5)

    def norm() -> Tensor:
        return 1 + normal(c.hidden_size, std=0.1)

    layers = [
        Layer(
            attention_norm=norm(),
            qkv=matrix(q_size + 2 * kv_size, c.hidden_size),
            qkv_bias=normal(q_size + 2 * kv_size, std=0.1),
            o=matrix(c.hidden_size, q_size),
            o_bias=normal(c.hidden_size, std=0.1),
            mlp_norm=norm(),
            gate_up=matrix(2 * c.intermediate_size, c.hidden_size),
            down=matrix(c.hidden_size, c.intermediate_size),
        )
        for _ in range(c.layers)
    ]
    return Weights(
        normal(c.vocab_size, c.hidden_size, std=1.0),
        layers,
        norm(),
        matrix(c.vocab_size, c.hidden_size),
    )


class Batch(NamedTuple):
    """Requests in the middle of a block: one sub-block filled, the rest masks, KV of the context
    in place."""

    canvas: Tensor
    """[N, block] int64: what the step starts from."""
    position: Tensor
    """[N * block] int64: of each row in its text."""
    slots: Tensor
    """[N * block] int64: where a row's KV goes."""
    segments: SegmentTable
    caches: list[Tensor]
    """Per layer [pages, kv_heads, page_size, 2 * head_dim], the engine's layout: K, then V."""
    context: int
    """Tokens of text before each canvas."""
    kv_len: int
    """Of every request: the context and its canvas."""


MASK = 1


def random_batch(config: ModelConfig, requests: int, context: int) -> Batch:
    c, device = config, config.device
    kv_len = context + c.block
    pages = -(-kv_len // c.page_size)
    page_table = torch.randperm(requests * pages, device=device).view(requests, pages)
    position = context + torch.arange(c.block, device=device)
    page = page_table[:, position // c.page_size]
    canvas = torch.randint(2, c.vocab_size, (requests, c.block), device=device)
    canvas[:, c.sub_block :] = MASK
    shape = (requests * pages, c.kv_heads, c.page_size, 2 * c.head_dim)

    def int32(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=torch.int32)

    return Batch(
        canvas=canvas,
        position=position.repeat(requests),
        slots=(page * c.page_size + position % c.page_size).flatten(),
        segments=SegmentTable(
            int32(torch.arange(requests + 1) * c.block),
            int32(torch.full((requests,), kv_len)),
            int32(torch.zeros(requests)),
            int32(page_table),
        ),
        caches=[torch.randn(shape, dtype=c.dtype, device=device) for _ in range(c.layers)],
        context=context,
        kv_len=kv_len,
    )


def bytes_to_move(config: ModelConfig, weights: Weights, batch: Batch) -> int:
    """Weights once and the KV that each request's canvas sees once."""
    return weights.bytes_read() + len(batch.canvas) * batch.kv_len * config.kv_bytes_per_token


def add_and_normalize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and that sum."""
    residual = x + residual
    wide = residual.float() if residual.dtype != torch.float64 else residual
    scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (wide * scale).to(x.dtype) * weight, residual


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [rows, heads, head_dim] by cos and sin [rows, head_dim / 2]."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def gate(gate_up: Tensor) -> Tensor:
    """SwiGLU of [rows, 2 * intermediate_size]."""
    left, right = gate_up.chunk(2, dim=-1)
    return F.silu(left) * right


def rotary_table(config: ModelConfig, position: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, head_dim / 2], fp64."""
    exponent = torch.arange(0, config.head_dim, 2, device=position.device).double()
    angle = position[:, None] * config.rope_theta ** -(exponent / config.head_dim)
    return angle.cos(), angle.sin()


class StepResult(NamedTuple):
    hidden: Tensor
    """[N * block, hidden_size] after the last norm."""
    logits: Tensor
    """[N * sub_block, vocab_size]."""
    canvas: Tensor
    """[N, block] int64 after the step."""


class Step:
    """The step over one batch, ready to be captured: every call starts from the same canvas."""

    def __init__(self, config: ModelConfig, weights: Weights, batch: Batch) -> None:
        self.config, self.weights, self.batch = config, weights, batch
        cos, sin = rotary_table(config, batch.position)
        self.cos, self.sin = cos.float(), sin.float()
        self.canvases = Canvases(
            batch.canvas, batch.context, config.sub_block, config.vocab_size, MASK
        )
        self.row_params = self.canvases.row_params()
        # The engine has fused kernels of vLLM for these; on a GPU they are fused here too.
        self.add_and_normalize, self.rotate, self.gate = add_and_normalize, rotate, gate
        if config.device == "cuda":
            self.add_and_normalize = torch.compile(add_and_normalize)
            self.rotate, self.gate = torch.compile(rotate), torch.compile(gate)

    def _attention(self, x: Tensor, layer: Layer, cache: Tensor) -> Tensor:
        c, batch = self.config, self.batch
        heads = (c.q_heads, c.kv_heads, c.kv_heads)
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(len(x), sum(heads), c.head_dim)
        rotated = self.rotate(qkv[:, : c.q_heads + c.kv_heads], self.cos, self.sin)
        q, key = rotated.split(heads[:2], dim=1)
        k_cache, v_cache = cache.transpose(1, 2).split(c.head_dim, dim=-1)
        write_kv(key, qkv[:, -c.kv_heads :], k_cache, v_cache, batch.slots)
        if cache is batch.caches[0]:  # the first layer finds it for all of them
            bounds = {"max_query_len": c.block, "max_kv_len": batch.kv_len}
            self.launch = attention_launch(q, k_cache, batch.segments, **bounds)
        inputs, scale = (q, k_cache, v_cache, batch.segments), c.head_dim**-0.5
        out = segment_attention(*inputs, scale=scale, launch=self.launch)
        return F.linear(out.flatten(1), layer.o, layer.o_bias)

    def __call__(self) -> StepResult:
        w, eps = self.weights, self.config.eps
        planned = self.canvases.plan()
        x = w.embedding[planned.tokens]
        residual = torch.zeros_like(x)
        for layer, cache in zip(w.layers, self.batch.caches, strict=True):
            x, residual = self.add_and_normalize(x, residual, layer.attention_norm, eps)
            x = self._attention(x, layer, cache)
            x, residual = self.add_and_normalize(x, residual, layer.mlp_norm, eps)
            x = F.linear(self.gate(F.linear(x, layer.gate_up)), layer.down)
        hidden, _ = self.add_and_normalize(x, residual, w.norm, eps)
        logits = F.linear(hidden[planned.rows], w.head)
        drawn = draw_rows(logits, self.row_params, MASK, planned.packed.valid)
        return StepResult(hidden, logits, self.canvases.decide(planned, drawn).tokens)
