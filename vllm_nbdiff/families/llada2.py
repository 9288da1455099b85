# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.0 and 2.1: Ling 2.0's layers (Bailing-MoE), experts chosen within groups, unchanged.

Source: modeling_llada2_moe.py of the LLaDA2.0-mini checkpoint.
"""

from vllm.model_executor.models.bailing_moe import BailingMoeForCausalLM

from vllm_nbdiff.families.nbdiff import BlockDiffusion


class LLaDA2MoeModelLM(BlockDiffusion, BailingMoeForCausalLM):
    """LLaDA2.0-mini and flash, LLaDA2.1-mini and flash."""
