# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of random weights, and the weights of a checkpoint that they are merged into."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "word_embeddings")


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, float32."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {name: weight.float() for file in files for name, weight in load_file(file).items()}


def write_adapter(
    checkpoint: Path,
    folder: Path,
    modules: Sequence[str] = LINEAR,
    rank: int = 8,
    seed: int = 0,
    strength: float = 0.5,
) -> Path:
    """Write an adapter of the `modules` of a checkpoint as PEFT does.

    Args:
        strength: norm of what it adds to a weight, by that of the weight.

    Returns:
        A checkpoint beside it, whose weights are merged with it.
    """
    generator = torch.Generator().manual_seed(seed)
    merged, adapter = weights_of(checkpoint), {}
    for name, weight in merged.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules or weight.dim() != 2:
            continue
        embeds = module.endswith(EMBEDDINGS)
        outputs, inputs = weight.T.shape if embeds else weight.shape
        a = torch.randn(rank, inputs, generator=generator)
        b = torch.randn(outputs, rank, generator=generator)
        product = b @ a
        b *= strength * weight.norm() / product.norm() / 2  # alpha is twice the rank
        merged[name] = weight + 2 * (b @ a).T if embeds else weight + 2 * b @ a
        kind = "lora_embedding_{}" if embeds else "lora_{}.weight"
        for letter, factor in (("A", a), ("B", b)):
            adapter[f"base_model.model.{module}.{kind.format(letter)}"] = factor
    assert adapter
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    whole = folder.with_name(f"{folder.name}-merged")
    whole.mkdir()
    save_file(merged, whole / "model.safetensors")
    shutil.copy(checkpoint / "config.json", whole)
    return whole
