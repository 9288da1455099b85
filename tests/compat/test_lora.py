# SPDX-License-Identifier: Apache-2.0
"""How vLLM maps rows to LoRA adapters, and the plugin's own operations on a CPU.

A test named `test_..._is_needed` that fails means that the patch can go.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LoRAModelManager
from vllm.lora.ops.torch_ops import bgmv_expand
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from scripts.contract.release import installed
from vllm_nbdiff.compat import take_adapters_from
from vllm_nbdiff.engine.cpu_lora import RowWisePunica
from vllm_nbdiff.versions import SUPPORTED_VLLM

IDS: list[int | None] = [7, None, 9]
"""Of the adapters in the slots of stacked weights."""
INPUT, RANK, OUTPUT = 12, 4, 20


def test_room_for_rows_of_logits_is_needed() -> None:
    """More rows of logits than tokens of a batch do not fit."""
    wrapper = PunicaWrapperCPU(8, max_batches=4, device="cpu")
    wrapper.update_metadata(LoRAMapping((7,) * 8, (7,) * 8, True), IDS, 4, 100)
    with pytest.raises(RuntimeError, match="size of tensor"):
        wrapper.update_metadata(LoRAMapping((7,) * 8, (7,) * 9, True), IDS, 4, 100)


def test_own_cpu_operations_is_needed() -> None:
    """vLLM 0.32 gives rows without an adapter that of the last slot."""
    assert (0, 32) in SUPPORTED_VLLM
    y = torch.zeros(2, OUTPUT)
    bgmv_expand(torch.ones(2, RANK), torch.ones(3, 1, OUTPUT, RANK), y, torch.tensor([-1, -1]))
    assert y.any() == installed()[0].startswith("0.32.")


def test_note_draft_only_adapters_is_needed() -> None:
    """A loaded adapter has nothing of its configuration."""
    names = inspect.signature(LoRAModel.__init__).parameters
    assert not {"config", "peft_helper"} & set(names)


def test_rows_without_their_adapter() -> None:
    """Of the forward alone: the same mapping has all of its adapters again."""
    wrapper = RowWisePunica(16, max_batches=4, device="cpu")
    manager: Any = SimpleNamespace(
        punica_wrapper_mapping={DEFAULT_LANGUAGE_WRAPPER_KEY: wrapper},
        lora_index_to_id=IDS,
        _set_adapter_mapping=lambda mapping: wrapper.update_metadata(mapping, IDS, 4, 100),
        _last_mapping=None,
        _last_slot_layout=None,
    )
    (a, b), x = factors(torch.float32), torch.randn(6, INPUT)
    ids = [7, 7, 9, 0, 9, 7]
    for without in ([0, 2], [1], []):
        LoRAModelManager.set_adapter_mapping(manager, LoRAMapping((*ids,), (*ids,), True))
        rows = torch.zeros(6, dtype=torch.bool)
        rows[without] = True
        if without:
            take_adapters_from(manager, rows, rows.flip(0))
        for own, add in ((rows, add_linear), (rows.flip(0), add_logits)):
            kept = [0 if gone else i for i, gone in zip(ids, own.tolist(), strict=True)]
            y = torch.zeros(6, OUTPUT)
            add(wrapper, y, x, a, b)
            torch.testing.assert_close(y.double(), added(x, kept, a, b), rtol=0, atol=1e-5)


def add_linear(wrapper: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (OUTPUT,))


def add_logits(wrapper: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    wrapper.add_lora_logits(y, x, a, b, 1.0)


def mapped(wrapper: PunicaWrapperBase, tokens: list[int], logits: list[int]) -> None:
    wrapper.update_metadata(LoRAMapping(tuple(tokens), tuple(logits), True), IDS, 4, 100)


def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stacked weights [3, 1, RANK, INPUT] and [3, 1, OUTPUT, RANK]."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 1, RANK, INPUT), torch.randn(3, 1, OUTPUT, RANK)
    return a.to(dtype), b.to(dtype)


def added(x: Tensor, ids: list[int], a: Tensor, b: Tensor) -> Tensor:
    """What adapters add to each row, in float64."""
    rows = []
    for row, lora in zip(x.double(), ids, strict=True):
        slot = IDS.index(lora) if lora else 0
        rows.append(b[slot, 0].double() @ (a[slot, 0].double() @ row) * bool(lora))
    return torch.stack(rows)


@pytest.mark.parametrize("ids", [[0] * 6, [7] * 6, [9, 0, 7, 9, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_cpu_operations(ids: list[int], dtype: torch.dtype) -> None:
    """Rows in any order, of layers in two slices and of logits."""
    wrapper = RowWisePunica(16, max_batches=4, device="cpu")
    (a, b), x = factors(dtype), torch.randn(6, INPUT).to(dtype)
    limit = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.25}
    mapped(wrapper, ids, ids[:3])
    y = torch.zeros(6, 2 * OUTPUT, dtype=dtype)
    wrapper.add_lora_linear(y, x, (a, 2 * a), (b, b), 1.0, (OUTPUT, OUTPUT))
    both = torch.cat([added(x, ids, a, b), added(x, ids, 2 * a, b)], 1)
    torch.testing.assert_close(y.double(), both, **limit)
    y = torch.zeros(3, OUTPUT, dtype=dtype)
    wrapper.add_lora_logits(y, x[:3], a, b, 1.0)
    torch.testing.assert_close(y.double(), added(x[:3], ids[:3], a, b), **limit)
    embedded = torch.stack(
        [a[IDS.index(i) if i else 0, 0] @ row for i, row in zip(ids, x, strict=True)]
    )
    y = torch.zeros(6, OUTPUT, dtype=dtype)
    wrapper.add_lora_embedding(y, embedded, b)
    torch.testing.assert_close(y.double(), added(x, ids, a, b), **limit)
