# SPDX-License-Identifier: Apache-2.0
"""One denoise step of a model shaped like NBDiff-7B: random weights, PyTorch's matrix products,
this project's kernels for the rest, nothing that depends on the host between first and last launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm_nbdiff.kernels.canvas_update import CanvasUpdate, SelectionRule, canvas_update
from vllm_nbdiff.kernels.row_statistics import row_statistics
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.segment_table import SegmentTable
from vllm_nbdiff.kernels.write_kv import write_kv


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
    """[N, block] int32: what the step starts from."""
    position: Tensor
    """[N * block] int64: of each row in its text."""
    slots: Tensor
    """[N * block] int64: where a row's KV goes."""
    segments: SegmentTable
    caches: list[Tensor]
    """Per layer [pages, 2, page_size, kv_heads, head_dim], K and V of a page side by side."""
    rows: Tensor
    """[N * sub_block] int64: rows that predict the second sub-block, one before each position."""
    places: Tensor
    """[N * sub_block] int64: those positions in the flat canvas."""
    kv_len: int
    """Of every request: the context and its canvas."""


MASK, EOS = 1, 2


def random_batch(config: ModelConfig, requests: int, context: int) -> Batch:
    c, device = config, config.device
    kv_len = context + c.block
    pages = -(-kv_len // c.page_size)
    page_table = torch.randperm(requests * pages, device=device).view(requests, pages)
    position = context + torch.arange(c.block, device=device)
    page = page_table[:, position // c.page_size]
    canvas = torch.randint(3, c.vocab_size, (requests, c.block), device=device)
    canvas[:, c.sub_block :] = MASK
    first = torch.arange(requests, device=device)[:, None] * c.block
    places = (first + c.sub_block + torch.arange(c.sub_block, device=device)).flatten()
    shape = (requests * pages, 2, c.page_size, c.kv_heads, c.head_dim)

    def int32(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=torch.int32)

    return Batch(
        canvas=int32(canvas),
        position=position.repeat(requests),
        slots=(page * c.page_size + position % c.page_size).flatten(),
        segments=SegmentTable(
            int32(torch.arange(requests + 1) * c.block),
            int32(torch.full((requests,), kv_len)),
            int32(torch.zeros(requests)),
            int32(page_table),
        ),
        caches=[torch.randn(shape, dtype=c.dtype, device=device) for _ in range(c.layers)],
        rows=places - 1,
        places=places,
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
    """[N, block] int32 after the step."""
    update: CanvasUpdate


class Step:
    """The step over one batch, ready to be captured: every call starts from the same canvas."""

    def __init__(self, config: ModelConfig, weights: Weights, batch: Batch) -> None:
        self.config, self.weights, self.batch = config, weights, batch
        cos, sin = rotary_table(config, batch.position)
        self.cos, self.sin = cos.float(), sin.float()
        requests, device = len(batch.canvas), config.device
        self.canvas = batch.canvas.clone()
        self.proposed = torch.zeros_like(batch.canvas)
        self.scores = torch.zeros((2, *batch.canvas.shape), device=device)
        int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.rules = {
            "eos_token_ids": torch.tensor([EOS], **int32),
            "rule": torch.full((requests,), SelectionRule.THRESHOLD, **int32),
            "parameter": torch.full((requests,), 0.9, device=device),
            "sub_block_length": torch.full((requests,), config.sub_block, **int32),
        }
        # The engine has fused kernels of vLLM for these; on a GPU they are fused here too.
        self.add_and_normalize, self.rotate, self.gate = add_and_normalize, rotate, gate
        if device == "cuda":
            self.add_and_normalize = torch.compile(add_and_normalize)
            self.rotate, self.gate = torch.compile(rotate), torch.compile(gate)

    def _attention(self, x: Tensor, layer: Layer, cache: Tensor) -> Tensor:
        c, batch = self.config, self.batch
        heads = (c.q_heads, c.kv_heads, c.kv_heads)
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(len(x), sum(heads), c.head_dim)
        rotated = self.rotate(qkv[:, : c.q_heads + c.kv_heads], self.cos, self.sin)
        q, key = rotated.split(heads[:2], dim=1)
        k_cache, v_cache = cache.unbind(1)
        write_kv(key, qkv[:, -c.kv_heads :], k_cache, v_cache, batch.slots)
        out = segment_attention(
            q,
            k_cache,
            v_cache,
            batch.segments,
            scale=c.head_dim**-0.5,
            max_query_len=c.block,
            max_kv_len=batch.kv_len,
        )
        return F.linear(out.flatten(1), layer.o, layer.o_bias)

    def _decide(self, logits: Tensor) -> CanvasUpdate:
        """Statistics of the second sub-block's rows to their positions, then the fill."""
        found = row_statistics(logits)
        places = self.batch.places
        probability, entropy = self.scores
        self.proposed.view(-1)[places] = found.token
        probability.view(-1)[places] = found.probability
        entropy.view(-1)[places] = found.entropy
        return canvas_update(
            self.canvas,
            self.proposed,
            probability,
            probability,
            entropy,
            mask_token_id=MASK,
            **self.rules,
        )

    def __call__(self) -> StepResult:
        self.canvas.copy_(self.batch.canvas)
        w, eps = self.weights, self.config.eps
        x = w.embedding[self.canvas.flatten()]
        residual = torch.zeros_like(x)
        for layer, cache in zip(w.layers, self.batch.caches, strict=True):
            x, residual = self.add_and_normalize(x, residual, layer.attention_norm, eps)
            x = self._attention(x, layer, cache)
            x, residual = self.add_and_normalize(x, residual, layer.mlp_norm, eps)
            x = F.linear(self.gate(F.linear(x, layer.gate_up)), layer.down)
        hidden, _ = self.add_and_normalize(x, residual, w.norm, eps)
        logits = F.linear(hidden[self.batch.rows], w.head)
        return StepResult(hidden, logits, self.canvas, self._decide(logits))


def reference_step(
    config: ModelConfig, weights: Weights, batch: Batch, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of the step in plain PyTorch, attention dense over gathered KV, in
    `compute_dtype` but for norms and rotations in at least fp32; the caches are left alone."""
    c = config
    wide = torch.promote_types(compute_dtype, torch.float32)
    requests, block = batch.canvas.shape
    cos, sin = (table.to(wide) for table in rotary_table(c, batch.position))
    pages = batch.segments.page_table.long()
    x = weights.embedding[batch.canvas.flatten()].to(compute_dtype)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = x @ weight.to(compute_dtype).T
        return product if bias is None else product + bias.to(compute_dtype)

    def normalize(x: Tensor, weight: Tensor) -> Tensor:
        scale = (x.to(wide).square().mean(dim=-1, keepdim=True) + c.eps).rsqrt()
        return (x.to(wide) * scale * weight.to(wide)).to(compute_dtype)

    def by_request(x: Tensor) -> Tensor:
        return x.view(requests, -1, x.shape[-2], c.head_dim).transpose(1, 2)

    for layer, cache in zip(weights.layers, batch.caches, strict=True):
        qkv = linear(normalize(x, layer.attention_norm), layer.qkv, layer.qkv_bias)
        q, key, value = qkv.view(len(x), -1, c.head_dim).split(
            (c.q_heads, c.kv_heads, c.kv_heads), dim=1
        )
        q, key = rotate(q, cos, sin), rotate(key, cos, sin)
        gathered = cache[pages].transpose(1, 2).flatten(2, 3)[:, :, : batch.kv_len - block]
        context = gathered.to(compute_dtype).transpose(2, 3)
        keys = torch.cat([context[:, 0], by_request(key)], dim=2)
        values = torch.cat([context[:, 1], by_request(value)], dim=2)
        out = F.scaled_dot_product_attention(by_request(q), keys, values, enable_gqa=True)
        x = x + linear(out.transpose(1, 2).reshape(len(x), -1), layer.o, layer.o_bias)
        up = linear(normalize(x, layer.mlp_norm), layer.gate_up)
        x = x + linear(gate(up), layer.down)
    hidden = normalize(x, weights.norm)
    return hidden, linear(hidden[batch.rows], weights.head)


def check(step: Step) -> None:
    """Raise RuntimeError unless the step's error against fp64 is at most twice that of eager
    PyTorch in the model's dtype, for hidden states and logits alike."""
    result = step()
    inputs = (step.config, step.weights, step.batch)
    eager = reference_step(*inputs, step.config.dtype)
    exact = reference_step(*inputs, torch.float64)
    for name, ours, plain, truth in zip(
        ("hidden states", "logits"), result[:2], eager, exact, strict=True
    ):
        error, bound = (float((x.double() - truth).abs().max()) for x in (ours, plain))
        if not error <= 2 * bound:
            raise RuntimeError(f"{name}: error {error:.3g}, that of eager PyTorch is {bound:.3g}")
