# SPDX-License-Identifier: Apache-2.0
"""Which LoRA adapter each row of a forward uses; only where the server has adapters.

The runner maps the rows that it scheduled, and one row of logits a request. Forwards here have
rows of their own on a CPU, and rows of logits of their own everywhere.

A draft-only adapter (`adapt --lora --draft-only`) acts in the rows of canvases alone, which on a
device the host does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_nbdiff import compat
from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.rows import TokenRows

if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager


def canvas_rows(plan: Plan, rows: TokenRows) -> Tensor:
    """[T] bool: which rows of a forward are those of canvases, not of text."""
    exists = plan.canvases.exists
    flags = torch.zeros_like(plan.segments.causal)
    flags[:, flags.shape[1] - exists.shape[1] :] = exists
    return flags.flatten()[rows.segment]


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

    def draft_only(self, slots: np.ndarray) -> np.ndarray:
        """[B] bool: whether the adapters of the requests at `slots` [B] int64 are, as loaded."""
        ids = compat.draft_only_ids(self._manager)
        if not ids:
            return np.zeros(len(slots), bool)
        return np.isin(self._id_of_slot[slots], list(ids))

    def begin_forward(self, slots: np.ndarray, tokens: np.ndarray, logits: np.ndarray) -> None:
        """Set the adapters of a forward's rows, draft-only ones everywhere.

        Args:
            slots: [B] int64, of its requests.
            tokens: [T] int64, batch index of every row's request.
            logits: [n] int64, the same of rows of logits.
        """
        self._prompt_rows = None
        ids = self._id_of_slot[slots]
        self._set(ids[tokens], ids[logits])

    def keep_to_drafts(self, slots: np.ndarray, owner: Tensor, drafts: Tensor, of: Tensor) -> None:
        """Take draft-only adapters from the other rows of the forward that has begun.

        Args:
            slots: [B] int64, of its requests.
            owner: [T] int64, batch index of every row's request.
            drafts: [T] bool, rows of canvases.
            of: [n] int64, rows that logits are of.
        """
        draft_only = async_tensor_h2d(self.draft_only(slots), device=owner.device)
        others = draft_only[owner] & ~drafts
        compat.take_adapters_from(self._manager, others, others[of])

    def score_prompts(self, slots: np.ndarray, scheduled: np.ndarray) -> None:
        """From now on logits are asked for prompts, laid out as the runner scheduled them.

        Args:
            slots: [B] int64, of the scheduled requests.
            scheduled: [B] int64, tokens of each.
        """
        ids = np.where(self.draft_only(slots), 0, self._id_of_slot[slots])
        self._prompt_rows = ids.repeat(scheduled)

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
