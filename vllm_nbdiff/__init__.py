# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion language models for a stock release of vLLM."""

import logging

__version__ = "0.1.0"


def register() -> None:
    """Register the plugin's models with vLLM; called by vLLM in every process.

    Re-entrant. On a vLLM that is not a supported release it only warns, in one line: other models
    are served as without the plugin.
    """
    from vllm_nbdiff.names import ATTENTION_BACKEND, LOGGER
    from vllm_nbdiff.versions import unsupported_vllm

    if (problem := unsupported_vllm()) is not None:
        logging.getLogger(LOGGER).warning(problem)
        return

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_nbdiff import compat
    from vllm_nbdiff.families.configs import CONFIGS
    from vllm_nbdiff.families.family import FAMILIES
    from vllm_nbdiff.startup import NBDiffConfigHook

    for family in FAMILIES:
        for architecture, model_class in family.models.items():
            if architecture not in ModelRegistry.models:
                ModelRegistry.register_model(architecture, model_class)
            compat.register_config_hook(architecture, NBDiffConfigHook)
    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    # Another plugin's `CUSTOM` backend stays.
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, ATTENTION_BACKEND)
    compat.apply_patches()
