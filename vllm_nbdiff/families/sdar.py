# SPDX-License-Identifier: Apache-2.0
"""SDAR (arXiv 2510.06303) and TraDo (arXiv 2509.06949): Qwen3 and Qwen3-MoE, unchanged.

Source: modeling_sdar.py and generate.py of https://github.com/JetAstra/SDAR.
"""

from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from vllm_nbdiff.families.nbdiff import BlockDiffusion


class SDARForCausalLM(BlockDiffusion, Qwen3ForCausalLM):
    """SDAR-1.7B, 4B and 8B, TraDo-4B and 8B."""


class SDARMoeForCausalLM(BlockDiffusion, Qwen3MoeForCausalLM):
    """SDAR-30B-A3B."""
