# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint of every family: golden, or random where no golden cases exist."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from tests.conftest import GOLDEN

GOLDEN_FAMILIES = ("nemotron_labs_diffusion", "sdar", "fast_dllm_v2", "llada2")

SIZE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "mask_token_id": 255,
    "eos_token_id": 2,
}
# The class of transformers that has the layers, and what the family's config.json adds.
RANDOM: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "sdar_moe": (
        Qwen3MoeConfig,
        {
            "architectures": ["SDARMoeForCausalLM"],
            "model_type": "sdar_moe",
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "rope_theta": 1_000_000.0,
        },
    ),
    "stable_diffcoder": (
        LlamaConfig,
        {
            "architectures": ["StableDiffcoderForCausalLM"],
            "model_type": "llama",
            "rope_theta": 500_000.0,
        },
    ),
}


def config_of(family: str) -> dict[str, Any]:
    """The config.json of a family's checkpoint."""
    if family in GOLDEN_FAMILIES:
        return json.loads((GOLDEN / family / "tiny_a" / "config.json").read_text())
    return SIZE | RANDOM[family][1]


def checkpoint(family: str, folder: Path) -> Path:
    """The folder to serve: the golden one, or `folder` with random weights."""
    if family in GOLDEN_FAMILIES:
        return GOLDEN / family / "tiny_a"
    config_class, own = RANDOM[family]
    keys = SIZE | own | {"model_type": config_class.model_type, "initializer_range": 0.2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_class(**keys)).float().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SIZE | own))
    return folder
