# SPDX-License-Identifier: Apache-2.0
"""Weights of the tokens of a row that pass its filters: their sums over parts of the row, and the
token at which the sum passes a target.

`rows` of the device functions is as in `logit_filter.py`, with the largest logit of a part of the
row; `bounds` is what `load_bounds` gives.
"""

import triton
import triton.language as tl

from .logit_filter import NO_TOKEN, ordered_key
from .logits import LOWEST, exponent_scale, load_logits, rows_of_program, two_largest


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
def kept_weights(offsets, rows, bounds, SHIFT: tl.constexpr, HAS_BAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Exponents scale (x - best), and 2^ them in fp64 of the tokens that pass the filters, 0 of the
    others."""
    row_ptr, best, scale, vocab_size, banned_id = rows
    top, floor, threshold, last = bounds
    x = load_logits(row_ptr, offsets, vocab_size, banned_id, HAS_BAN)
    exponent = (x - best[:, None]) * scale[:, None]
    key = ordered_key(x, SHIFT)
    kept = (key > threshold[:, None]) | ((key == threshold[:, None]) & (offsets <= last[:, None]))
    kept = kept & (x > LOWEST) & ((x - top[:, None]) * scale[:, None] >= floor[:, None])
    return exponent, tl.where(kept, tl.exp2(exponent), 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["num_rows", "banned_id", "num_parts", "tiles_per_part"])
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
    num_parts,
    tiles_per_part,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_NEEDED: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
):
    _index, valid, row, needed = rows_of_program(needed_ptr, num_rows, BLOCK_R, HAS_NEEDED)
    if tl.max(needed.to(tl.int32), axis=0) == 0:
        return
    part = tl.program_id(1)
    begin = part * tiles_per_part * BLOCK_V
    end = tl.minimum(begin + tiles_per_part * BLOCK_V, vocab_size)
    x_ptr = logits_ptr + row[:, None] * stride_logits
    scale = exponent_scale(temperature_ptr, row, HAS_TEMPERATURE) + tl.zeros([BLOCK_R], tl.float32)
    best, second, bad = two_largest(
        x_ptr, begin, end, vocab_size, banned_id, BLOCK_R, BLOCK_V, HAS_BAN
    )
    rows = (x_ptr, best, scale, vocab_size, banned_id)
    pointers = (top_ptr, floor_ptr, threshold_ptr, last_ptr)
    bounds = load_bounds(pointers, row, best, vocab_size, SHIFT, HAS_BOUNDS)
    # Of the kept weights, relative to the part's largest: their sum, that of their products with
    # the exponents, and their number.
    mass = tl.zeros([BLOCK_R], tl.float64)
    weighted = tl.zeros([BLOCK_R], tl.float64)
    count = tl.zeros([BLOCK_R], tl.float64)
    for start in range(begin, end, BLOCK_V):
        offsets = (start + tl.arange(0, BLOCK_V))[None, :]
        exponent, weights = kept_weights(offsets, rows, bounds, SHIFT, HAS_BAN)
        mass += tl.sum(weights, axis=1)
        weighted += tl.sum(exponent.to(tl.float64) * weights, axis=1)
        count += tl.sum((weights > 0.0).to(tl.float64), axis=1)
    place = (row * num_parts + part) * 3
    tl.store(extent_ptr + place, best, mask=valid)
    tl.store(extent_ptr + place + 1, second, mask=valid)
    tl.store(extent_ptr + place + 2, bad.to(tl.float32), mask=valid)
    tl.store(sums_ptr + place, mass, mask=valid)
    tl.store(sums_ptr + place + 1, weighted, mask=valid)
    tl.store(sums_ptr + place + 2, count, mask=valid)


@triton.jit
def invert(  # type: ignore[no-untyped-def]
    target,
    begin,
    num_tiles,
    rows,
    bounds,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
):
    """Per row: the token at which the sum of the kept weights, of those from `begin` [BLOCK_R] on,
    passes the target, and its weight."""
    # The tile in which the sum passes the target or, if rounding hides it, the last one with mass.
    reached = tl.zeros([BLOCK_R], tl.float64)
    before = tl.zeros([BLOCK_R], tl.float64)
    tile = begin
    for number in range(0, num_tiles):
        start = begin + number * BLOCK_V
        offsets = start[:, None] + tl.arange(0, BLOCK_V)[None, :]
        _exponent, weights = kept_weights(offsets, rows, bounds, SHIFT, HAS_BAN)
        mass = tl.sum(weights, axis=1)
        here = (reached <= target) & (mass > 0.0)
        tile = tl.where(here, start, tile)
        before = tl.where(here, reached, before)
        reached += mass

    offsets = tile[:, None] + tl.arange(0, BLOCK_V)[None, :]
    _exponent, weights = kept_weights(offsets, rows, bounds, SHIFT, HAS_BAN)
    passed = (before[:, None] + tl.cumsum(weights, axis=1) > target[:, None]) & (weights > 0.0)
    first = tl.min(tl.where(passed, offsets, NO_TOKEN), axis=1)
    last = tl.max(tl.where(weights > 0.0, offsets, 0), axis=1)
    token = tl.where(first == NO_TOKEN, last, first)
    return token, tl.sum(tl.where(offsets == token[:, None], weights, 0.0), axis=1)
