# SPDX-License-Identifier: Apache-2.0
"""Weights of the tokens of a row that pass its filters, and their sums over each tile of the row.

Tiles are the same whatever a batch holds, so that a row's result depends on that row alone, bit for
bit.
"""

import triton
import triton.language as tl

from .logit_filter import ordered_key
from .logits import LOWEST, load_logits, rows_of_program


@triton.jit
def load_bounds(  # type: ignore[no-untyped-def]
    pointers, row, best, vocab_size, SHIFT: tl.constexpr, HAS_BOUNDS: tl.constexpr
):
    """Of `FilterBounds` what is loaded, or bounds that everything passes."""
    top_ptr, floor_ptr, threshold_ptr, last_ptr = pointers
    if HAS_BOUNDS:
        top, floor = tl.load(top_ptr + row), tl.load(floor_ptr + row)
        threshold, last = tl.load(threshold_ptr + row), tl.load(last_ptr + row)
    else:
        top, floor = best, best * 0.0 - float("inf")
        threshold, last = (
            ordered_key(best * 0.0 + LOWEST, SHIFT),
            (row * 0 + vocab_size).to(tl.int32),
        )
    return top, floor, threshold, last


@triton.jit
def kept_weights(x, offsets, best, scale, bounds, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of logits x at token ids `offsets`: exponents scale (x - best), and 2^ them in fp64 of the
    tokens that pass the filters, 0 of the others; `bounds` is what `load_bounds` gives."""
    top, floor, threshold, last = bounds
    exponent = (x - best[:, None]) * scale[:, None]
    key = ordered_key(x, SHIFT)
    kept = (key > threshold[:, None]) | ((key == threshold[:, None]) & (offsets <= last[:, None]))
    kept = kept & (x > LOWEST) & ((x - top[:, None]) * scale[:, None] >= floor[:, None])
    return exponent, tl.where(kept, tl.exp2(exponent), 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["num_rows", "banned_id", "num_tiles", "tiles_per_part"])
def partial_sums_kernel(  # type: ignore[no-untyped-def]
    extent_ptr,
    sums_ptr,
    logits_ptr,
    top_ptr,
    floor_ptr,
    threshold_ptr,
    last_ptr,
    temperature_ptr,
    needed_ptr,
    num_rows,
    vocab_size,
    banned_id,
    stride_logits,
    num_tiles,
    tiles_per_part,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_NEEDED: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
):
    """Per row and tile: the largest logit, the second largest (equal on a tie), whether there is a
    NaN; and of the kept weights, relative to the largest, their sum, that of their products with
    the exponents, and their number."""
    _index, valid, row, needed, scale, x_ptr = rows_of_program(
        logits_ptr, stride_logits, temperature_ptr, needed_ptr, num_rows,
        BLOCK_R, HAS_TEMPERATURE, HAS_NEEDED,
    )  # fmt: skip
    if tl.max(needed.to(tl.int32), axis=0) == 0:
        return
    pointers = (top_ptr, floor_ptr, threshold_ptr, last_ptr)
    first = tl.program_id(1) * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, num_tiles)):
        offsets = (tile * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
        x = load_logits(x_ptr, offsets, vocab_size, banned_id, HAS_BAN)
        bad = tl.max((x != x).to(tl.int32), axis=1)
        x = tl.where(x != x, LOWEST, x)
        best = tl.max(x, axis=1)
        winner = x == best[:, None]
        rest = tl.max(tl.where(winner, LOWEST, x), axis=1)
        second = tl.where(tl.sum(winner.to(tl.int32), axis=1) > 1, best, rest)
        bounds = load_bounds(pointers, row, best, vocab_size, SHIFT, HAS_BOUNDS)
        exponent, weights = kept_weights(x, offsets, best, scale, bounds, SHIFT)
        weighted = tl.where(weights > 0.0, exponent.to(tl.float64) * weights, 0.0)
        place = (row * num_tiles + tile) * 3
        tl.store(extent_ptr + place, best, mask=valid)
        tl.store(extent_ptr + place + 1, second, mask=valid)
        tl.store(extent_ptr + place + 2, bad.to(tl.float32), mask=valid)
        tl.store(sums_ptr + place, tl.sum(weights, axis=1), mask=valid)
        tl.store(sums_ptr + place + 1, tl.sum(weighted, axis=1), mask=valid)
        tl.store(sums_ptr + place + 2, tl.sum((weights > 0.0).to(tl.float64), axis=1), mask=valid)
