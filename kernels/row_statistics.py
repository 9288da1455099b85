# SPDX-License-Identifier: Apache-2.0
"""What a decoding rule asks of a row of logits, from one pass over it and without an fp32 copy."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logits import (
    GREEDY_BELOW,
    LN_2,
    LOWEST,
    TILE,
    check_logits,
    columns,
    exponent_scale,
    load_logits,
    log_probabilities_reference,
    row_parts,
    sound_rows,
)
from .validation import as_bytes

# A tile is 4 vectors of LANES consecutive logits: 4 warps x 32 threads x a 16-byte load of bf16.
LANES = TILE // 4


class RowStatistics(NamedTuple):
    """Per row of logits [R, V]; p = softmax(logits / temperature). All [R].

    Of a skipped row the token is -1 and the rest 0."""

    token: Tensor
    """int32: index of the largest logit, the smallest index of equals."""
    probability: Tensor
    """fp32: p[token]."""
    entropy: Tensor
    """fp32: -sum p ln p, nats."""
    margin: Tensor
    """fp32: p[token] minus the second largest probability."""
    lse: Tensor
    """fp32: ln sum exp(logits / temperature); of a row without a sound distribution -inf."""


@triton.jit
def _collapse(top, second, tile, total, weighted, scale):  # type: ignore[no-untyped-def]
    """Join partial statistics along axis 0, see `_partial_statistics_kernel` for the terms."""
    best = tl.max(top, axis=0)
    winner = top == best
    first_tile = tl.min(tl.where(winner, tile, 0x7FFFFFFF), axis=0)
    rest = tl.max(tl.where(winner, LOWEST, top), axis=0)
    tie = tl.sum(winner.to(tl.int32), axis=0) > 1
    runner_up = tl.maximum(tl.max(second, axis=0), tl.where(tie, best, rest))
    shift = (top - best) * scale
    decay = tl.exp2(shift)
    weighted = tl.sum(decay * (weighted + shift * total), axis=0)
    total = tl.sum(decay * total, axis=0)
    return best, runner_up, first_tile, total, weighted


@triton.jit
def _add(x, top, scale, total, weighted):  # type: ignore[no-untyped-def]
    d = (x - top) * scale
    power = tl.exp2(d)
    return total + power, weighted + d * power


@triton.jit(do_not_specialize=["banned_id", "num_splits", "tiles_per_split"])
def _partial_statistics_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    tile_ptr,
    logits_ptr,
    temperature_ptr,
    needed_ptr,
    vocab_size,
    banned_id,
    num_splits,
    tiles_per_split,
    stride_logits,
    LANES: tl.constexpr,
    HAS_BAN: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_NEEDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if HAS_NEEDED:  # noqa: SIM102 (one condition would load where there is nothing to load)
        if tl.load(needed_ptr + row) == 0:
            return
    scale = exponent_scale(temperature_ptr, row, HAS_TEMPERATURE)
    row_ptr = logits_ptr + row * stride_logits
    lane = tl.arange(0, LANES)

    # Per lane: the two largest logits, the first tile of the largest, and with
    # d = scale (x - top) the sums of 2^d and d 2^d, rescaled when top grows.
    top = tl.full([LANES], LOWEST, tl.float32)
    second = tl.full([LANES], LOWEST, tl.float32)
    first_tile = tl.zeros([LANES], tl.int32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    num_tiles = (vocab_size + 4 * LANES - 1) // (4 * LANES)
    last_tile = tl.minimum((split + 1) * tiles_per_split, num_tiles)
    for tile in range(split * tiles_per_split, last_tile):
        offsets = tile * (4 * LANES) + lane
        x0 = load_logits(row_ptr, offsets, vocab_size, banned_id, HAS_BAN)
        x1 = load_logits(row_ptr, offsets + LANES, vocab_size, banned_id, HAS_BAN)
        x2 = load_logits(row_ptr, offsets + 2 * LANES, vocab_size, banned_id, HAS_BAN)
        x3 = load_logits(row_ptr, offsets + 3 * LANES, vocab_size, banned_id, HAS_BAN)

        high01 = tl.maximum(x0, x1)
        high23 = tl.maximum(x2, x3)
        largest = tl.maximum(high01, high23)
        lower = tl.maximum(tl.minimum(x0, x1), tl.minimum(x2, x3))
        lower = tl.maximum(lower, tl.minimum(high01, high23))
        second = tl.maximum(tl.maximum(second, lower), tl.minimum(top, largest))
        first_tile = tl.where(largest > top, tile, first_tile)
        new_top = tl.maximum(top, largest)
        shift = (top - new_top) * scale
        decay = tl.exp2(shift)
        weighted = decay * (weighted + shift * total)
        total = decay * total
        top = new_top
        total, weighted = _add(x0, top, scale, total, weighted)
        total, weighted = _add(x1, top, scale, total, weighted)
        total, weighted = _add(x2, top, scale, total, weighted)
        total, weighted = _add(x3, top, scale, total, weighted)

    best, runner_up, tile, total, weighted = _collapse(
        top, second, first_tile, total, weighted, scale
    )
    part = row * num_splits + split
    tl.store(partial_ptr + part * 4, best)
    tl.store(partial_ptr + part * 4 + 1, runner_up)
    tl.store(partial_ptr + part * 4 + 2, total)
    tl.store(partial_ptr + part * 4 + 3, weighted)
    tl.store(tile_ptr + part, tile)


@triton.jit(do_not_specialize=["banned_id", "num_splits"])
def _final_statistics_kernel(  # type: ignore[no-untyped-def]
    token_ptr,
    probability_ptr,
    entropy_ptr,
    margin_ptr,
    lse_ptr,
    partial_ptr,
    tile_ptr,
    logits_ptr,
    temperature_ptr,
    needed_ptr,
    vocab_size,
    banned_id,
    num_splits,
    stride_logits,
    LANES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    HAS_BAN: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_NEEDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_NEEDED:  # noqa: SIM102 (one condition would load where there is nothing to load)
        if tl.load(needed_ptr + row) == 0:
            tl.store(token_ptr + row, -1)
            tl.store(probability_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(margin_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
            return
    scale = exponent_scale(temperature_ptr, row, HAS_TEMPERATURE)
    split = tl.arange(0, BLOCK_SPLITS)
    mask = split < num_splits
    part = row * num_splits + split
    top = tl.load(partial_ptr + part * 4, mask=mask, other=LOWEST)
    second = tl.load(partial_ptr + part * 4 + 1, mask=mask, other=LOWEST)
    total = tl.load(partial_ptr + part * 4 + 2, mask=mask, other=0.0)
    weighted = tl.load(partial_ptr + part * 4 + 3, mask=mask, other=0.0)
    tile = tl.load(tile_ptr + part, mask=mask, other=0)
    best, runner_up, tile, total, weighted = _collapse(top, second, tile, total, weighted, scale)

    # The pass over the row kept the tile of the largest logit; its index is found by reading that
    # tile once more.
    offsets = tile * (4 * LANES) + tl.arange(0, 4 * LANES)
    x = load_logits(logits_ptr + row * stride_logits, offsets, vocab_size, banned_id, HAS_BAN)
    token = tl.min(tl.where(x == best, offsets, 0x7FFFFFFF), axis=0)

    found = (best > LOWEST) & (total > 0.0)  # NaN and +inf make the total NaN
    total = tl.where(found, total, 1.0)
    log2_total = tl.log2(total)
    entropy = tl.maximum(log2_total - weighted / total, 0.0) * LN_2
    lse = (best * scale + log2_total) * LN_2
    tl.store(token_ptr + row, tl.where(found, token, 0))
    tl.store(probability_ptr + row, tl.where(found, 1.0 / total, 0.0))
    tl.store(entropy_ptr + row, tl.where(found, entropy, float("inf")))
    margin = (1.0 - tl.exp2((runner_up - best) * scale)) / total
    tl.store(margin_ptr + row, tl.where(found, margin, 0.0))
    tl.store(lse_ptr + row, tl.where(found, lse, -float("inf")))


def row_statistics(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    banned_id: int | None = None,
    needed: Tensor | None = None,
) -> RowStatistics:
    """Argmax, its probability, entropy, top-2 margin and log-sum-exp of every needed row.

    Arguments as in `logits.py`. Reads a needed row once from memory; computes in fp32.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or stride is wrong.
    """
    check_logits(logits, temperature, banned_id, needed)
    (num_rows, vocab_size), device = logits.shape, logits.device
    token = torch.empty(num_rows, dtype=torch.int32, device=device)
    result = RowStatistics(token, *columns(4, num_rows, device))
    if num_rows == 0:
        return result
    num_splits, tiles_per_split = row_parts(num_rows, vocab_size, device)
    partial = torch.empty((num_rows, num_splits, 4), device=device)
    tile = torch.empty((num_rows, num_splits), dtype=torch.int32, device=device)
    # A pointer argument cannot be None on every Triton release; an absent one is never read.
    inputs = [logits, *(logits if x is None else as_bytes(x) for x in (temperature, needed))]
    options = {
        "LANES": LANES,
        "HAS_BAN": banned_id is not None,
        "HAS_TEMPERATURE": temperature is not None,
        "HAS_NEEDED": needed is not None,
    }
    sizes = (vocab_size, -1 if banned_id is None else banned_id, num_splits)
    _partial_statistics_kernel[(num_rows, num_splits)](
        partial, tile, *inputs, *sizes, tiles_per_split, logits.stride(0), **options
    )
    _final_statistics_kernel[(num_rows,)](
        *result,
        partial,
        tile,
        *inputs,
        *sizes,
        logits.stride(0),
        # As many as a row may have, so that one kernel serves any number of rows.
        BLOCK_SPLITS=triton.next_power_of_2(triton.cdiv(vocab_size, TILE)),
        **options,
    )
    return result


def row_statistics_reference(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    banned_id: int | None = None,
    needed: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> RowStatistics:
    """Plain PyTorch `row_statistics` in `compute_dtype`."""
    log_p = log_probabilities_reference(logits, temperature, banned_id, compute_dtype)
    p = log_p.exp()
    best = log_p.max(dim=-1, keepdim=True).values
    token = (log_p == best).int().argmax(dim=-1)  # the first of equals
    entropy = -(p * log_p).nan_to_num().sum(dim=-1)
    top_2 = p.topk(min(2, p.shape[-1]), dim=-1).values
    margin = top_2[:, 0] - (top_2[:, 1] if p.shape[-1] > 1 else 0.0)
    lse = logits.to(compute_dtype).gather(-1, token[:, None])[:, 0]
    if temperature is not None:
        lse = lse / torch.where(temperature < GREEDY_BELOW.value, 1.0, temperature)
    fields = [token.int(), best[:, 0].exp(), entropy, margin, lse - best[:, 0]]
    sound = sound_rows(logits, banned_id)
    unsound = (0, 0.0, torch.inf, 0.0, -torch.inf)
    fields = [x.where(sound, value) for x, value in zip(fields, unsound, strict=True)]
    if needed is not None:
        skipped = needed == 0
        fields = [x.masked_fill(skipped, -1 if i == 0 else 0) for i, x in enumerate(fields)]
    return RowStatistics(*fields)
