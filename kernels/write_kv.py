# SPDX-License-Identifier: Apache-2.0
"""Writes the keys and values of a forward's tokens into their slots of the paged KV cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kv_scales import KVScales, check_kv_scales, to_fp8, to_fp8_reference
from .validation import (
    FLOAT_DTYPES,
    once_per_layout,
    require,
    require_tensor,
    values_are_checked,
)


@triton.jit(do_not_specialize=["num_tokens"])
def _write_kv_kernel(  # type: ignore[no-untyped-def]
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    copy_row_ptr,
    copy_slot_ptr,
    k_scale_ptr,
    v_scale_ptr,
    num_tokens,
    num_kv_heads,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_KV_SCALES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    copy = token - num_tokens
    slot = tl.load(slot_ptr + token, mask=copy < 0, other=-1)
    slot = tl.where(copy < 0, slot, tl.load(copy_slot_ptr + copy, mask=copy >= 0, other=-1))
    if slot < 0:
        return
    token = tl.where(copy < 0, token, tl.load(copy_row_ptr + copy, mask=copy >= 0, other=0))
    page = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    head = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < num_kv_heads) & (dim < HEAD_DIM)

    key = tl.load(key_ptr + token * stride_key_token + head * stride_key_head + dim, mask=mask)
    if HAS_KV_SCALES:
        key = to_fp8(key, k_scale_ptr)
    k_row = k_cache_ptr + page * stride_k_page + offset * stride_k_slot
    tl.store(k_row + head * stride_k_head + dim, key, mask=mask)

    value = tl.load(
        value_ptr + token * stride_value_token + head * stride_value_head + dim, mask=mask
    )
    if HAS_KV_SCALES:
        value = to_fp8(value, v_scale_ptr)
    v_row = v_cache_ptr + page * stride_v_page + offset * stride_v_slot
    tl.store(v_row + head * stride_v_head + dim, value, mask=mask)


@once_per_layout
def _check_layout(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    copies: tuple[Tensor, Tensor],
    kv_scales: KVScales | None,
) -> None:
    device = key.device
    require_tensor("key", key, (None, None, None), FLOAT_DTYPES, device)
    require_tensor("value", value, tuple(key.shape), (key.dtype,), device)
    heads, head_dim = key.shape[1:]
    dtype = check_kv_scales(kv_scales, k_cache, key.dtype, device)
    require_tensor("k_cache", k_cache, (None, None, heads, head_dim), (dtype,), device)
    require_tensor("v_cache", v_cache, tuple(k_cache.shape), (dtype,), device)
    require_tensor("slot_mapping", slot_mapping, (key.shape[0],), (torch.int64,), device)
    rows, slots = copies
    require_tensor("copies", rows, (slots.shape[0],), (torch.int64,), device)
    require_tensor("copies", slots, (rows.shape[0],), (torch.int64,), device)


def _check_values(
    num_tokens: int, num_slots: int, slot_mapping: Tensor, copies: tuple[Tensor, Tensor]
) -> None:
    rows, slots = copies
    for argument, given in (("slot_mapping", slot_mapping), ("copies", slots)):
        valid = bool(((given >= -1) & (given < num_slots)).all())
        require(valid, argument, f"slot outside [-1, {num_slots})")
    valid = bool(((rows >= 0) & (rows < num_tokens)).all())
    require(valid, "copies", f"row outside [0, {num_tokens})")


def write_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    copies: tuple[Tensor, Tensor] | None = None,
    kv_scales: KVScales | None = None,
    check_values: bool | None = None,
) -> None:
    """Store key and value rows at their slots; slot -1 skips a token.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim], fp16, bf16 or fp32.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], any strides with a
            contiguous last dimension, same dtype or, with `kv_scales`, fp8 e4m3; written in place.
        slot_mapping: [num_tokens] int64, page * page_size + offset, or -1.
        copies: [n] int64 each: rows of key and value that are stored once more, and the slots, or
            -1. In the same launch, so that a graph can be captured that makes any number of them.
        kv_scales: an fp8 cache takes key and value divided by them, at most 448 in magnitude.
        check_values: read rows and slots back and check their range (a device synchronisation);
            None checks on CPU only.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong.
    """
    rows, slots = copies or (slot_mapping[:0], slot_mapping[:0])
    _check_layout(key, value, k_cache, v_cache, slot_mapping, (rows, slots), kv_scales)
    num_tokens, num_kv_heads, head_dim = key.shape
    if values_are_checked(check_values, key.device):
        _check_values(num_tokens, k_cache.shape[0] * k_cache.shape[1], slot_mapping, (rows, slots))
    if num_tokens == 0:
        return
    _write_kv_kernel[(num_tokens + len(rows),)](
        key,
        value,
        k_cache,
        v_cache,
        slot_mapping,
        rows,
        slots,
        *(kv_scales or (key, key)),  # not read unless HAS_KV_SCALES
        num_tokens,
        num_kv_heads,
        *key.stride()[:2],
        *value.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        PAGE_SIZE=k_cache.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_H=triton.next_power_of_2(num_kv_heads),
        BLOCK_D=triton.next_power_of_2(head_dim),
        HAS_KV_SCALES=kv_scales is not None,
    )


def write_kv_reference(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    copies: tuple[Tensor, Tensor] | None = None,
    kv_scales: KVScales | None = None,
) -> None:
    """Plain PyTorch `write_kv`."""
    if copies is not None:
        key, value = (torch.cat([own, own[copies[0]]]) for own in (key, value))
        slot_mapping = torch.cat([slot_mapping, copies[1]])
    if kv_scales is not None:
        key, value = to_fp8_reference(key, kv_scales.key), to_fp8_reference(value, kv_scales.value)
    kept = slot_mapping >= 0
    page_size = k_cache.shape[1]
    page, offset = slot_mapping[kept] // page_size, slot_mapping[kept] % page_size
    k_cache[page, offset] = key[kept]
    v_cache[page, offset] = value[kept]
