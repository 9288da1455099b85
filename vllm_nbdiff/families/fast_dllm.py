# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2 (arXiv 2509.26328): the layers of Qwen2.5.

vLLM's Qwen2 takes no head size of its own from a config; its Llama does, and with biases on q, k
and v alone it is the same model.
Source: modeling.py of the Fast_dLLM_v2_7B checkpoint.
"""

from vllm.model_executor.models.llama import LlamaForCausalLM

from vllm_nbdiff.families.nbdiff import BlockDiffusion


class FastDLLMQwenForCausalLM(BlockDiffusion, LlamaForCausalLM):
    """Fast_dLLM_v2_1.5B and 7B; their configuration asks for the biases."""
