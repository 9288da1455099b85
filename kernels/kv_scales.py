# SPDX-License-Identifier: Apache-2.0
"""An fp8 KV cache: what its numbers stand for."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .validation import require, require_tensor

FP8 = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)  # of fp8 e4m3; what exceeds it is stored as it


class KVScales(NamedTuple):
    """Per-tensor factors of an fp8 e4m3 cache: a key is `key` times its number in the cache."""

    key: Tensor
    """[] fp32, positive, on the cache's device."""
    value: Tensor
    """Likewise for values."""


def check_kv_scales(
    scales: KVScales | None, cache: Tensor, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """The dtype a cache must have: `dtype` or, with scales, fp8.

    Raises:
        ValueError: scales of a wrong shape, dtype or device, or an fp8 cache without any.
    """
    if scales is None:
        require(cache.dtype != FP8, "kv_scales", "an fp8 cache needs them")
        return dtype
    require(dtype != torch.float32, "kv_scales", "an fp8 cache goes with fp16 or bf16 rows")
    for name, scale in zip(("kv_scales.key", "kv_scales.value"), scales, strict=True):
        require_tensor(name, scale, (), (torch.float32,), device, contiguous_last=False)
    return FP8


@triton.jit
def to_fp8(x, scale_ptr):  # type: ignore[no-untyped-def]
    """x / scale as fp8 e4m3."""
    scaled = x.to(tl.float32) / tl.load(scale_ptr)
    return tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST).to(tl.float8e4nv)


def to_fp8_reference(x: Tensor, scale: Tensor) -> Tensor:
    """Plain PyTorch `to_fp8`."""
    return (x.float() / scale).clamp(-LARGEST.value, LARGEST.value).to(FP8)
