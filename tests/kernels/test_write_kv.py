# SPDX-License-Identifier: Apache-2.0
"""KV writes against plain PyTorch, bit for bit."""

import pytest
import torch
from torch import Tensor
from vllm_nbdiff.kernels.write_kv import write_kv, write_kv_reference


def make_cache(dtype: torch.dtype, page_size: int = 5, heads: int = 3) -> tuple[Tensor, Tensor]:
    k_cache, v_cache = torch.randn(53, 2, page_size, heads, 24).to(dtype).unbind(1)
    return k_cache, v_cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 13, 257])
def test_writes_slots_and_nothing_else(dtype: torch.dtype, num_tokens: int) -> None:
    k_cache, v_cache = make_cache(dtype)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    key, value = torch.randn(num_tokens, 6, 24).to(dtype).split(3, dim=1)
    slots = torch.randperm(265)[:num_tokens]
    slots[::4] = -1
    write_kv_reference(key, value, expected_k, expected_v, slots)
    write_kv(key, value, k_cache, v_cache, slots)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


def test_rows_are_stored_once_more() -> None:
    """As if they were rows of their own; what is not copied has slot -1, whatever its row."""
    k_cache, v_cache = make_cache(torch.float32)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    key, value = torch.randn(6, 3, 24), torch.randn(6, 3, 24)
    slots = torch.tensor([7, 8, -1, 10, 11, 12])
    rows, more = torch.tensor([5, 0, 2, 0]), torch.tensor([100, -1, 31, 264])
    for row, slot in [*enumerate(slots.tolist()), (5, 100), (2, 31), (0, 264)]:
        if slot >= 0:
            expected_k[slot // 5, slot % 5] = key[row]
            expected_v[slot // 5, slot % 5] = value[row]
    caches = (k_cache.clone(), v_cache.clone())
    write_kv(key, value, k_cache, v_cache, slots, copies=(rows, more))
    write_kv_reference(key, value, *caches, slots, copies=(rows, more))
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)
    assert torch.equal(caches[0], expected_k) and torch.equal(caches[1], expected_v)


def test_wrong_arguments_are_named() -> None:
    k_cache, v_cache = make_cache(torch.float32)
    key, value = torch.randn(4, 3, 24), torch.randn(4, 3, 24)
    slots = torch.arange(4)
    good = {"key": key, "value": value, "k_cache": k_cache, "v_cache": v_cache}
    bad = {
        "key": key.long(),
        "value": value[:3],
        "k_cache": k_cache[:, :, :2],
        "v_cache": v_cache.half(),
    }
    for argument, wrong in bad.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            write_kv(**{**good, argument: wrong}, slot_mapping=slots)
    for wrong_slots in (slots.int(), slots - 2, slots + 262):
        with pytest.raises(ValueError, match=r"^slot_mapping: "):
            write_kv(**good, slot_mapping=wrong_slots, check_values=True)
    for wrong_copies in ((slots, slots[:3]), (slots + 1, slots), (slots, slots + 262)):
        with pytest.raises(ValueError, match=r"^copies: "):
            write_kv(**good, slot_mapping=slots, copies=wrong_copies, check_values=True)
