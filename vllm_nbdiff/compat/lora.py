# SPDX-License-Identifier: Apache-2.0
"""LoRA: which adapter each row of a forward uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vllm_nbdiff.compat.patching import patch
from vllm_nbdiff.draft_only import is_draft_only

if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager


def map_rows_of_adapters(model: Any, most: int) -> LoRAModelManager:
    """Give the adapters of a loaded model a mapping of as many rows as a forward may have.

    Called by our ModelState, after the model is loaded and before graphs are captured.

    Symptom: rows of logits, which may be more than the tokens of a batch, do not fit; and on a CPU
    requests without an adapter are answered with that of another request in their batch.
    Upstream: `LoRAModelManager._init_punica_wrapper` (vllm/lora/model_manager.py), which gives the
    mapping of logits the room of tokens; `bgmv_shrink`, `bgmv_expand`
    (vllm/lora/ops/torch_ops/lora_ops.py), where the index of no adapter is the last one's
    (https://github.com/vllm-project/vllm/pull/48421).
    Remove the first when the room may be chosen, the second when CPU rows may have no adapter.

    Args:
        model: of vLLM, with LoRA layers.
        most: rows of tokens or of logits.
    """
    from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY
    from vllm.lora.punica_wrapper import get_punica_wrapper
    from vllm.platforms import current_platform

    manager: LoRAModelManager = model.lora_manager
    make: Any = get_punica_wrapper
    if current_platform.is_cpu():
        from vllm_nbdiff.engine.cpu_lora import RowWisePunica

        make = RowWisePunica
    wrapper = make(
        most,
        max_batches=manager.max_num_seqs,
        device=manager.device,
        lora_config=manager.lora_config,
    )
    manager.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY] = wrapper
    for module in manager.modules.values():
        module.set_mapping(wrapper)
    return manager


def note_draft_only_adapters() -> None:
    """Have a worker note, in `draft_only_ids` of a model's LoRA manager, which adapters it loads
    are draft-only.

    Symptom: what an adapter's configuration says beside what vLLM knows is gone once it is loaded,
    and its folder may be gone too.
    Upstream: `WorkerLoRAManager._load_adapter` (vllm/lora/worker_manager.py).
    Remove when a loaded adapter keeps its configuration.
    """
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager

    def make(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_adapter(self: Any, lora_request: Any) -> Any:
            lora = load(self, lora_request)
            folder = Path(get_adapter_absolute_path(lora_request.lora_path))
            ids = draft_only_ids(self._adapter_manager) - {lora.id}
            if is_draft_only(folder):
                ids |= {lora.id}
            self._adapter_manager.draft_only_ids = ids
            return lora

        return load_adapter

    patch(WorkerLoRAManager, "_load_adapter", make)


def draft_only_ids(manager: Any) -> frozenset[int]:
    """Of the adapters that a model's LoRA manager has or had."""
    ids: frozenset[int] = getattr(manager, "draft_only_ids", frozenset())
    return ids


def take_adapters_from(manager: LoRAModelManager, tokens: Tensor, logits: Tensor) -> None:
    """Let rows of the mapping that is set have no adapter; the next one is set anew.

    Symptom: an adapter that acts in some rows of a request alone acts in all of them, as a mapping
    is made on the host, which on a device does not know what its rows hold.
    Upstream: `PunicaWrapperGPU.update_metadata` (vllm/lora/punica_wrapper/punica_gpu.py),
    `LoRAModelManager.set_adapter_mapping` (vllm/lora/model_manager.py), which skips a mapping that
    equals the last one.
    Remove when a mapping may be given as tensors.

    Args:
        tokens: [T] bool, rows of tokens.
        logits: [n] bool, rows of logits.
    """
    from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY
    from vllm.utils.gpu_sync_debug import gpu_sync_allowed

    wrapper: Any = manager.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY]
    wrapper.token_lora_indices.masked_fill_(tokens, -1)
    wrapper.sampler_indices.masked_fill_(logits, -1)
    if tokens.device.type == "cpu":
        wrapper.group_rows()
    else:
        with gpu_sync_allowed():
            wrapper.token_mapping_meta.prepare_tensors(wrapper.token_lora_indices)
            wrapper.prompt_mapping_meta.prepare_tensors(wrapper.sampler_indices)
    manager._last_mapping = None
