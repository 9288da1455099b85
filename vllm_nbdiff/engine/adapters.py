# SPDX-License-Identifier: Apache-2.0
"""Which LoRA adapter each row of a forward uses; only where the server has adapters.

The runner maps the rows that it scheduled, and one row of logits a request. Forwards here have
rows of their own on a CPU, and rows of logits of their own everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager


class AdapterTable:
    """The adapters of all requests; tells LoRA layers those of rows.

    Order: `GPUModelRunner.execute_model` (vllm/v1/worker/gpu/model_runner.py):
    `self._set_active_loras`, `model_state.prepare_attn`.
    Upstream: `compute_prompt_logprobs_with_chunking`,
    `PromptLogprobsWorker.compute_prompt_token_id_logprobs`
    (vllm/v1/worker/gpu/sample/prompt_logprob.py), which slice hidden states.
    """

    def __init__(self, manager: LoRAModelManager, slots: int) -> None:
        """With the model's manager, whose adapters the runner loads, and room for requests."""
        self._manager = manager
        self._id_of_slot = np.zeros(slots, np.int64)
        self._prompt_rows: np.ndarray | None = None

    def add_request(self, slot: int, lora_request: LoRARequest | None) -> None:
        """Note the adapter of a request; 0 is none."""
        self._id_of_slot[slot] = lora_request.lora_int_id if lora_request is not None else 0

    def begin_forward(self, slots: np.ndarray, tokens: np.ndarray, logits: np.ndarray) -> None:
        """Set the adapters of a forward's rows.

        Args:
            slots: [B] int64, of its requests.
            tokens: [T] int64, batch index of every row's request.
            logits: [n] int64, the same of rows of logits.
        """
        self._prompt_rows = None
        ids = self._id_of_slot[slots]
        self._set(ids[tokens], ids[logits])

    def score_prompts(self, slots: np.ndarray, scheduled: np.ndarray) -> None:
        """From now on logits are asked for prompts, laid out as the runner scheduled them.

        Args:
            slots: [B] int64, of the scheduled requests.
            scheduled: [B] int64, tokens of each.
        """
        self._prompt_rows = self._id_of_slot[slots].repeat(scheduled)

    def before_logits(self, hidden_states: Tensor) -> None:
        """Called with the [n, hidden] that logits are computed of."""
        if self._prompt_rows is None:
            return
        # vLLM scores prompts by slices of the last forward's hidden states.
        first = hidden_states.storage_offset() // hidden_states.stride(0)
        ids = self._prompt_rows[first : first + len(hidden_states)]
        self._set(ids, ids)

    def _set(self, tokens: np.ndarray, logits: np.ndarray) -> None:
        mapping = LoRAMapping(tuple(tokens.tolist()), tuple(logits.tolist()), is_prefill=True)
        self._manager.set_adapter_mapping(mapping)
