# SPDX-License-Identifier: Apache-2.0
"""Uniform random numbers keyed by (seed, position, step), for kernels.

`uniform.py` is the reference, and what decoding on the host draws with: both agree bit for bit, so
a seeded request has the same tokens wherever it is decoded.
"""

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 30)) * tl.full([], MIX_1, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], MIX_2, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def keyed_uniform(seed, position, step):  # type: ignore[no-untyped-def]
    """A float64 uniform in [0, 1) with 53 random bits, keyed by three integers."""
    golden = tl.full([], GOLDEN, tl.uint64)
    x = _mix(seed.to(tl.uint64) + golden)
    x = _mix(x + position.to(tl.uint64) + golden)
    x = _mix(x + step.to(tl.uint64) + golden)
    return (x >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)
