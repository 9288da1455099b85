# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (PEFT) of a checkpoint that stays as it is and serves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nbdiff.families.family import NBDIFF

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
"""Every linear layer but the output embedding."""


def served_mask_token(folder: Path, block_length: int) -> int:
    """Id of the mask token with which a checkpoint is served; an adapter trains no embeddings.

    Raises:
        ValueError: If the checkpoint has none, or another block length.
    """
    config = json.loads((folder / "config.json").read_text())
    served = config.get(NBDIFF.block_length_key, block_length)
    if served != block_length:
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


def rank_of(adapter: Path) -> int:
    """Largest rank of a saved adapter's matrices."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])
