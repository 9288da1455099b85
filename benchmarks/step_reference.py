# SPDX-License-Identifier: Apache-2.0
"""The step of `step_model.py` in plain PyTorch, and the check against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step_model import Batch, ModelConfig, Step, Weights, gate, rotary_table, rotate


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
        old_keys, old_values = gathered.to(compute_dtype).split(c.head_dim, dim=-1)
        keys = torch.cat([old_keys, by_request(key)], dim=2)
        values = torch.cat([old_values, by_request(value)], dim=2)
        out = F.scaled_dot_product_attention(by_request(q), keys, values, enable_gqa=True)
        x = x + linear(out.transpose(1, 2).reshape(len(x), -1), layer.o, layer.o_bias)
        up = linear(normalize(x, layer.mlp_norm), layer.gate_up)
        x = x + linear(gate(up), layer.down)
    hidden = normalize(x, weights.norm)
    # The row before a position predicts it.
    predicting = hidden.view(requests, block, -1)[:, c.sub_block - 1 : 2 * c.sub_block - 1]
    return hidden, linear(predicting.flatten(0, 1), weights.head)


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
