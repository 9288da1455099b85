# SPDX-License-Identifier: Apache-2.0
"""Nemotron-Labs-Diffusion (arXiv 2607.05722): NBDiff on Ministral 3, without the logit shift.

Ministral 3 is Llama with YaRN and queries that grow with the logarithm of their position.
Source: modeling_nemotron_labs_diffusion.py of the Nemotron-Labs-Diffusion-8B checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_nbdiff.families.nbdiff import BlockDiffusion

_NAMES = WeightsMapper(orig_to_new_prefix={"encoder.": "model.", "diffusion_head.": "lm_head."})


class NemotronLabsDiffusionModel(BlockDiffusion, MistralForCausalLM):
    """Nemotron-Labs-Diffusion 3B, 8B, 14B."""

    hf_to_vllm_mapper = MistralForCausalLM.hf_to_vllm_mapper | _NAMES

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names of the parameters that were loaded."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=_NAMES)
