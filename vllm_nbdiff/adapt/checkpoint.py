# SPDX-License-Identifier: Apache-2.0
"""Causal checkpoints in, block-diffusion checkpoints out."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vllm_nbdiff.config import MODEL_TYPES
from vllm_nbdiff.families.configs import FastDLLMQwenConfig, PanguEmbeddedConfig
from vllm_nbdiff.families.family import FAST_DLLM, NBDIFF, ContextMask

MASK_TOKEN = "<|mask|>"
FAMILIES = {family.context: family for family in (NBDIFF, FAST_DLLM)}
"""As what an adapted checkpoint is served, by the context that it was trained with."""


def load(
    folder: Path, dtype: torch.dtype, attention: str = "sdpa", context: ContextMask = "causal"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready to be trained, and its tokenizer.

    Raises:
        ValueError: If the engine has no backbone for the model with this context, or could not
            serve its attention.
    """
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    config = _pangu_as_llama(folder) if model_type == "PanguEmbedded" else None
    config = config or AutoConfig.from_pretrained(folder)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError("sliding-window attention layers cannot be adapted")
    if context == "block-causal" and not _fits_fast_dllm(config):
        raise ValueError(
            f"--context block-causal needs the layers of {FAST_DLLM.name}, llama without biases or "
            f"qwen2; those of --model {folder} ({model_type}) differ"
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation=attention
    )
    return model, AutoTokenizer.from_pretrained(folder)


def _fits_fast_dllm(config: PretrainedConfig) -> bool:
    """Whether there are no norms of q and k, and no biases but those of q, k and v."""
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return config.model_type in ("llama", "qwen2") and not biased


def _pangu_as_llama(folder: Path) -> PretrainedConfig:
    """openPangu-Embedded is Llama with biases on q, k, v and o, its remote code aside."""
    keys = PanguEmbeddedConfig.from_pretrained(folder).to_dict()
    biased = keys.pop("bias")
    for key in ("model_type", "architectures", "auto_map"):
        keys.pop(key, None)
    return LlamaConfig(**{**keys, "attention_bias": biased})


def ensure_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the mask token, one being added to tokenizer and model if there is none.

    The row of a new token is the mean of all others, in the input and the output embedding: it
    starts in the middle of what the layers are used to, where random rows of small norm would not.
    """
    known = getattr(model.config, "mask_token_id", None)
    if tokenizer.mask_token_id is None and known is not None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(known)
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    used = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    token = int(tokenizer.convert_tokens_to_ids(MASK_TOKEN))
    if token >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(token + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[token] = layer.weight[: min(used, token)].mean(dim=0)
    return token


def mark(
    folder: Path,
    source: Path,
    block_length: int,
    mask_token_id: int,
    defaults: dict[str, Any] | None = None,
    context: ContextMask = "causal",
) -> None:
    """Make a saved checkpoint name itself block-diffusion.

    Args:
        folder: Where ``save_pretrained`` wrote it.
        source: The checkpoint that it comes from.
        block_length: Served block length.
        mask_token_id: Id of the mask token.
        defaults: Served options, such as ``{"nbdiff_threshold": 0.9}``, for
            ``generation_config.json``.
        context: What it was trained with.
    """
    saved = json.loads((folder / "config.json").read_text())
    origin = json.loads((source / "config.json").read_text())
    if origin["model_type"] == "PanguEmbedded":
        origin.pop("auto_map", None)  # remote code that does not move along, nor is needed
        saved = origin | {"vocab_size": saved["vocab_size"], "dtype": saved["dtype"]}
    family = FAMILIES[context]
    if family is FAST_DLLM:
        biased = saved["model_type"] == "qwen2"
        saved |= {"model_type": FastDLLMQwenConfig.model_type, "qkv_bias": biased}
    saved |= {
        "architectures": list(family.models),
        family.block_length_key: block_length,
        "mask_token_id": mask_token_id,
        "use_cache": True,
    }
    _write(folder / "config.json", saved)
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    generation.pop("_from_model_config", None)  # with it transformers drops keys it does not know
    _write(path, generation | (defaults or {}))


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
