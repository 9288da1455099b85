# SPDX-License-Identifier: Apache-2.0
"""NBDiff (arXiv 2512.06776): a causal backbone whose active block attends to all of itself.

Finished text is plain causal KV, so the backbone is vLLM's own, unchanged: tensor parallelism,
quantization and weight loading are inherited. What differs, the attention segments and the
sampler, comes from `get_model_state_cls`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.openpangu import PanguEmbeddedForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

if TYPE_CHECKING:
    from vllm_nbdiff.engine.adapters import AdapterTable
    from vllm_nbdiff.engine.forward import Forward


class BlockDiffusion:
    """Mixin: a vLLM backbone decoded block by block."""

    adapters: AdapterTable | None = None
    """Of all requests; None: the server has none."""

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        segments: Forward | None = None,
    ) -> Any:
        """Hidden states [rows, hidden] of `segments`, or of the rows that the runner prepared."""
        forward = super().forward  # type: ignore[misc]
        if segments is None:
            return forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        with segments.context():
            hidden = forward(segments.input_ids, segments.rows.position)
        return hidden if segments.order is None else hidden[segments.order]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of hidden states [rows, hidden], of which there may be none.

        Block-causal prompts need no logits, and vLLM's CPU workers die gathering those of no rows.
        """
        if not len(hidden_states):
            return hidden_states.new_empty(0, self.config.vocab_size)  # type: ignore[attr-defined]
        if self.adapters is not None:
            self.adapters.before_logits(hidden_states)
        return super().compute_logits(hidden_states)  # type: ignore[misc]

    @staticmethod
    def get_model_state_cls() -> type:
        """The per-request state that model runner V2 uses for this model."""
        from vllm_nbdiff.engine.model_state import NBDiffModelState

        return NBDiffModelState


class NBDiffPangu(BlockDiffusion, PanguEmbeddedForCausalLM):
    """NBDiff-7B, openPangu-7B-Diffusion."""


class NBDiffQwen2(BlockDiffusion, Qwen2ForCausalLM):
    """A Qwen2 checkpoint adapted to block diffusion."""


class NBDiffQwen3(BlockDiffusion, Qwen3ForCausalLM):
    """A Qwen3 checkpoint adapted to block diffusion."""


class NBDiffForCausalLM(BlockDiffusion, LlamaForCausalLM):
    """The registered architecture; `model_type` of the checkpoint chooses the backbone."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> Any:
        """A finished model of the backbone's class (not ours, so `__init__` does not follow)."""
        model_type = vllm_config.model_config.hf_config.model_type
        backbone = BACKBONES[model_type]
        if backbone is not NBDiffForCausalLM:
            return backbone(vllm_config=vllm_config, prefix=prefix, **kwargs)
        return super().__new__(cls, vllm_config=vllm_config, prefix=prefix, **kwargs)


BACKBONES: dict[str, type] = {
    "PanguEmbedded": NBDiffPangu,
    "llama": NBDiffForCausalLM,
    "qwen2": NBDiffQwen2,
    "qwen3": NBDiffQwen3,
}
