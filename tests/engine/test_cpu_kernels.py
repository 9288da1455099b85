# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for vLLM's kernels, launched as its releases do."""

from typing import Any

import pytest
import torch

from vllm_nbdiff.engine.cpu_kernels import _gather_block_tables, _post_update
from vllm_nbdiff.engine.cpu_logprobs import _prompt_logprobs_token_ids

INT = torch.int32
# What vLLM 0.33 gives in addition, before keyword arguments.
WINDOW = {"0.32": (), "0.33": (torch.zeros(3, dtype=INT), torch.zeros(1, dtype=INT), None)}
DRAFTS = {"0.32": (), "0.33": (None, torch.zeros(3, 8, dtype=INT), 0)}


def pointer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr()], dtype=torch.uint64)


def gathered(*more: Any, **options: Any) -> list[list[int]]:
    """The tables of slots 2 and 0, of one page and two."""
    table = torch.tensor([[5, 6, 0], [7, 0, 0], [8, 0, 0]], dtype=INT)
    target, used = torch.zeros_like(table), torch.tensor([[2, 1, 1]], dtype=INT)
    slots, stride = torch.tensor([2, 0], dtype=INT), torch.tensor([3])
    arguments = (slots, pointer(table), pointer(target), stride, used, 3, 2)
    _gather_block_tables(*arguments, *more, BLOCK_SIZE=1024, **options)
    return target.tolist()


@pytest.mark.parametrize("release", WINDOW)
def test_gather_block_tables(release: str) -> None:
    options = {"MASK_SLIDING_WINDOW": False} if release == "0.33" else {}
    rows = gathered(*WINDOW[release], **options)
    assert [rows[0][:1], rows[1][:2]] == [[8], [5, 6]]


def test_sliding_windows_have_no_kernel() -> None:
    with pytest.raises(NotImplementedError, match="sliding window"):
        gathered(*WINDOW["0.33"], MASK_SLIDING_WINDOW=True)


@pytest.mark.parametrize("release", DRAFTS)
def test_post_update(release: str) -> None:
    """Slot 2 gets two tokens of four, slot 0 has computed three of its prompt."""
    slots, computed = torch.tensor([2, 0], dtype=INT), torch.tensor([0, 9, 10], dtype=INT)
    last, text = torch.zeros(3, 1, dtype=INT), torch.zeros(3, 16, dtype=INT)
    length = torch.tensor([8, 9, 10], dtype=INT)
    tokens = torch.tensor([[41, 42, 0, 0], [0, 0, 0, 0]])
    emitted, rejected = torch.tensor([2, 0]), torch.tensor([2, 0])
    starts = torch.tensor([0, 4, 7], dtype=INT)
    arguments = (slots, computed, last, None, 0, tokens, 4, emitted, rejected, starts)
    _post_update(*arguments, text, 16, length, *DRAFTS[release], num_warps=1)
    assert computed.tolist() == [3, 9, 12] and length.tolist() == [8, 9, 12]
    assert text[2, 10:12].tolist() == [41, 42] and last[2].item() == 42


def test_prompts_are_scored_up_to_the_last_position() -> None:
    """Rows behind it, of a canvas or of the last token of a prompt, name some token as well."""
    text = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]], dtype=INT)
    found = torch.full((5,), 1 << 40)
    slots, computed = torch.tensor([1, 0], dtype=INT), torch.tensor([2, 1], dtype=INT)
    starts = torch.tensor([0, 3, 5], dtype=INT)
    _prompt_logprobs_token_ids(found, starts, slots, computed, text, 4, 1024)
    assert found.tolist() == [23, 24, 0, 14, 0]
