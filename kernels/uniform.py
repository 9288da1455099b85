# SPDX-License-Identifier: Apache-2.0
"""Uniform random numbers keyed by (seed, position, step), without state: a chain of splitmix64.

A draw depends on nothing else, so a seeded request gives the same tokens alone, in any batch,
after preemption and on every tensor-parallel rank. Plain PyTorch, importable without triton.
"""

from __future__ import annotations

import torch

# Constants of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def uniform(seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Uniform draws in [0, 1) with 53 random bits.

    Args:
        seed: [n] int64, the request's seed.
        position: [n] int64, absolute position of the token to draw.
        step: [n] int64, denoise step within the block.

    Returns:
        [n] float64.
    """
    x = _mix(seed + _GOLDEN)
    x = _mix(x + position + _GOLDEN)
    x = _mix(x + step + _GOLDEN)
    return _shift_right(x, 11).double() * 2.0**-53
