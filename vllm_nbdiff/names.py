# SPDX-License-Identifier: Apache-2.0
"""The names under which vLLM knows the plugin's parts. Imports nothing of vLLM."""

from __future__ import annotations

from typing import Any

from vllm_nbdiff.families.family import family_of

ARCHITECTURE = "NBDiffForCausalLM"
SCHEDULER = "vllm_nbdiff.engine.scheduler.make_scheduler"
ATTENTION_BACKEND = "vllm_nbdiff.engine.attention.SegmentAttentionBackend"
LOGGER = "vllm.nbdiff"


def is_block_diffusion(vllm_config: Any) -> bool:
    """Whether the served checkpoint is one of ours (a `VllmConfig` may lack a model)."""
    model_config = getattr(vllm_config, "model_config", None)
    return model_config is not None and family_of(model_config.architectures) is not None
