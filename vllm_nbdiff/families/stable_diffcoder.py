# SPDX-License-Identifier: Apache-2.0
"""Stable-DiffCoder: Llama, unchanged.

Source: modeling_stable_diffcoder.py of the Stable-DiffCoder-8B-Instruct checkpoint.
"""

from vllm.model_executor.models.llama import LlamaForCausalLM

from vllm_nbdiff.families.nbdiff import BlockDiffusion


class StableDiffcoderForCausalLM(BlockDiffusion, LlamaForCausalLM):
    """Stable-DiffCoder-8B."""
