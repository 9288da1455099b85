# SPDX-License-Identifier: Apache-2.0
"""Every family's backbone in plain PyTorch or transformers, with the weights of a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Logits = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""`logits(ids [n], visible [n, n] bool, dtype) -> [n, vocabulary]`."""


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint."""
    return json.loads((folder / "config.json").read_text())


def of_transformers(
    backbone: type[PreTrainedModel], config_class: type[PreTrainedConfig], **names: str
) -> Callable[[Path], Logits]:
    """The logits of a class of transformers, to which parameters have other `names`."""

    def oracle(folder: Path) -> Logits:
        config = config_class(**config_of(folder) | {"model_type": config_class.model_type})
        model = backbone.from_pretrained(
            folder, config=config, key_mapping=names, experts_implementation="eager"
        ).eval()

        @torch.no_grad()
        def logits(ids: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
            model.to(dtype)
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)
            return model(input_ids=ids[None], attention_mask=mask[None, None]).logits[0]

        return logits

    return oracle


def llada2(folder: Path) -> Logits:
    """LLaDA2 in plain PyTorch, token by token where experts are chosen."""
    config, stored = config_of(folder), load_file(folder / "model.safetensors")

    @torch.no_grad()
    def logits(ids: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
        weights = {name: weight.to(dtype) for name, weight in stored.items()}
        rotation = _rotation(len(ids), config["rotary_dim"], config["rope_theta"], dtype)
        x = weights["model.word_embeddings.weight"][ids]
        for layer in range(config["num_hidden_layers"]):
            own = _below(weights, f"model.layers.{layer}.")
            normal = _normalised(x, own["input_layernorm.weight"], config)
            x = x + _attention(normal, _below(own, "attention."), rotation, visible, config)
            normal = _normalised(x, own["post_attention_layernorm.weight"], config)
            feed_forward = _mlp if layer < config["first_k_dense_replace"] else _experts
            x = x + feed_forward(normal, _below(own, "mlp."), config)
        return _normalised(x, weights["model.norm.weight"], config) @ weights["lm_head.weight"].T

    return logits


Weights = dict[str, Tensor]
Config = dict[str, Any]


def _below(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}


def _normalised(x: Tensor, weight: Tensor, config: Config) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight


def _rotation(length: int, size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, 1, size / 2], of angles in float32 as every implementation has them."""
    frequency = 1 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.arange(length, dtype=torch.float32)[:, None, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """The first half of each head turned, the second one as it is."""
    (cos, sin), size = rotation, rotation[0].shape[-1]
    a, b, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _attention(
    x: Tensor, weights: Weights, rotation: tuple[Tensor, Tensor], visible: Tensor, config: Config
) -> Tensor:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    qkv = (x @ weights["query_key_value.weight"].T).view(len(x), heads + 2 * kv_heads, -1)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    q = _rotated(_normalised(q, weights["query_layernorm.weight"], config), rotation)
    k = _rotated(_normalised(k, weights["key_layernorm.weight"], config), rotation)
    k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / config["head_dim"] ** 0.5
    scores = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", scores, v)
    return out.reshape(len(x), -1) @ weights["dense.weight"].T


def _mlp(x: Tensor, weights: Weights, config: Config) -> Tensor:
    gate, up = x @ weights["gate_proj.weight"].T, x @ weights["up_proj.weight"].T
    return (gate * gate.sigmoid() * up) @ weights["down_proj.weight"].T


def _experts(x: Tensor, weights: Weights, config: Config) -> Tensor:
    """Each token's best experts of its best groups, and the shared one."""
    out = _mlp(x, _below(weights, "shared_experts."), config)
    scores = (x @ weights["gate.weight"].T).sigmoid()
    size = config["num_experts"] // config["n_group"]
    for row, (token, score) in enumerate(zip(x, scores, strict=True)):
        groups = (score + weights["gate.expert_bias"]).view(-1, size)
        by_worth = groups.topk(2).values.sum(-1).argsort(descending=True)
        dropped = by_worth[config["topk_group"] :]
        groups = groups.index_fill(0, dropped, -torch.inf)
        chosen = groups.flatten().topk(config["num_experts_per_tok"]).indices
        shares = score[chosen] / score[chosen].sum() * config["routed_scaling_factor"]
        for expert, share in zip(chosen.tolist(), shares, strict=True):
            own = _below(weights, f"experts.{expert}.")
            out[row] += share * _mlp(token, own, config)
    return out


ORACLES: dict[str, Callable[[Path], Logits]] = {
    "nemotron_labs_diffusion": of_transformers(
        Ministral3ForCausalLM,
        Ministral3Config,
        **{"^encoder": "model", "^diffusion_head": "lm_head"},
    ),
    "sdar": of_transformers(Qwen3ForCausalLM, Qwen3Config),
    "fast_dllm_v2": of_transformers(Qwen2ForCausalLM, Qwen2Config),
    "llada2": llada2,
    "sdar_moe": of_transformers(Qwen3MoeForCausalLM, Qwen3MoeConfig),
    "stable_diffcoder": of_transformers(LlamaForCausalLM, LlamaConfig),
}
