# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion language models for a stock release of vLLM."""

__version__ = "0.1.0"


def register() -> None:
    """Register the plugin's models with vLLM; called by vLLM in every process.

    Re-entrant. Raises RuntimeError when the installed vLLM is not a supported release.
    """
    from vllm_nbdiff import compat
    from vllm_nbdiff.config import ARCHITECTURE, MODEL_CLASS, NBDiffConfigHook

    compat.check_vllm_version()

    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.models:
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    compat.register_config_hook(ARCHITECTURE, NBDiffConfigHook)
    compat.register_pangu_config()
    compat.register_attention_backend()
    compat.apply_patches()
