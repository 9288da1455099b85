# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (PEFT) of a checkpoint that stays as it is and serves them.

One that is draft-only acts in the rows of canvases alone. What is read causally, prompts and text
that is verified or committed, is the checkpoint's own, and so is its KV: mode ``verify`` gives the
checkpoint's text, in fewer forwards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_nbdiff.families.family import NBDIFF

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
"""Every linear layer but the output embedding."""


def served_mask_token(folder: Path, block_length: int, drafts: bool = False) -> int:
    """Id of the mask token with which a checkpoint is served; an adapter trains no embeddings.

    Raises:
        ValueError: If the checkpoint has none, or another block length; for ``drafts`` a shorter
            one.
    """
    config = json.loads((folder / "config.json").read_text())
    served = config.get(NBDIFF.block_length_key, block_length)
    if drafts and served < block_length:
        raise ValueError(
            f"--block-length {block_length} is more than that of --model, {served}, which will "
            "serve the adapter"
        )
    if served != block_length and not drafts:
        raise ValueError(
            f"--block-length {block_length} is not that of --model, {served}, which will serve the "
            "adapter"
        )
    token = config.get("mask_token_id", NBDIFF.mask_token_ids.get(config["model_type"]))
    if token is None:
        raise ValueError(
            "--lora trains no embeddings, so --model needs a mask token: set mask_token_id in its "
            "config.json"
        )
    return int(token)


def add_adapter(
    model: PreTrainedModel, rank: int, alpha: int | None, targets: Sequence[str]
) -> Any:
    """The model with a fresh adapter, its own weights frozen.

    Args:
        model: To be adapted.
        rank: Of the adapter's matrices.
        alpha: What the adapter adds is multiplied by alpha / rank; default: twice the rank.
        targets: Names of layers, or ``all-linear`` alone.

    Raises:
        ValueError: If no layer has one of the names, or the rank is not positive.
    """
    from peft import LoraConfig, get_peft_model

    named = list(targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=ALL_LINEAR if named == [ALL_LINEAR] else named,
    )
    return get_peft_model(model, config)


def act_on_drafts(model: Any) -> None:
    """Have the adapter of ``model`` act in the first ``model.noised_columns`` columns of rows alone
    (see :mod:`~vllm_nbdiff.adapt.loss`).

    Raises:
        ValueError: If it adapts more than linear layers of the backbone, whose rows are not those
            of the input.
    """
    from peft.tuners.lora import Linear

    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_B")}
    head = model.get_base_model().get_output_embeddings()
    for name, layer in layers.items():
        if not isinstance(layer, Linear) or layer is head:
            raise ValueError(f"--draft-only is for linear layers of the backbone, not {name}")

    def cut(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        drafts = torch.arange(output.shape[1], device=output.device) < model.noised_columns
        return output * drafts[:, None]

    for layer in layers.values():
        for added in layer.lora_B.values():
            added.register_forward_hook(cut)


def rank_of(adapter: Path) -> int:
    """Largest rank of a saved adapter's matrices."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])
