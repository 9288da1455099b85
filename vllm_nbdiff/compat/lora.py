# SPDX-License-Identifier: Apache-2.0
"""LoRA: which adapter each row of a forward uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
