# SPDX-License-Identifier: Apache-2.0
"""One token per row of logits, drawn by inverse CDF from the tempered and filtered distribution.

The uniform has 53 bits and the CDF is summed in fp64, so rare tokens keep their probability, which
fp32 Gumbel noise takes from them (arXiv 2409.02908).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logit_filter import (
    count_and_mass_above,
    filter_threshold,
    filtered_probabilities_reference,
    ordered_key,
    zero_bits,
)
from .logits import (
    GREEDY_BELOW,
    LOWEST,
    bias_row_stride,
    check_logits,
    exponent_scale,
    load_logits,
    log_probabilities_reference,
)
from .splitmix import keyed_uniform
from .uniform import uniform
from .validation import as_bytes, require, require_tensor

TILE = 4096  # logits per step of a program: one long row's part, or several short rows
NO_TOKEN = tl.constexpr(0x7FFFFFFF)


class RowSample(NamedTuple):
    """Per row of logits [R, V]."""

    token: Tensor
    """[R] int32: the token drawn; -1 for a skipped row or one that is -inf throughout."""
    probability: Tensor
    """[R] fp32: its probability under the distribution it was drawn from; 0 where token is -1."""


@triton.jit
def _largest(  # type: ignore[no-untyped-def]
    row_ptr,
    bias_ptr,
    vocab_size,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    top = tl.full([BLOCK_R, BLOCK_V], LOWEST, tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        offsets = (start + tl.arange(0, BLOCK_V))[None, :]
        x = load_logits(row_ptr, bias_ptr, offsets, vocab_size, HAS_BIAS)
        top = tl.maximum(top, x)
    return tl.max(top, axis=1)


@triton.jit
def _kept_weights(  # type: ignore[no-untyped-def]
    offsets,
    row_ptr,
    bias_ptr,
    threshold,
    floor,
    best,
    scale,
    vocab_size,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """2^(scale (x - best)) in fp64 of the tokens that pass the filters, 0 for the others."""
    x = load_logits(row_ptr, bias_ptr, offsets, vocab_size, HAS_BIAS)
    exponent = (x - best[:, None]) * scale[:, None]
    kept = (ordered_key(x, SHIFT) >= threshold[:, None]) & (x > LOWEST)
    kept = kept & (exponent >= floor[:, None])
    return tl.where(kept, tl.exp2(exponent), 0.0).to(tl.float64)


@triton.jit
def _row_sample_kernel(  # type: ignore[no-untyped-def]
    token_ptr,
    probability_ptr,
    logits_ptr,
    bias_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    temperature_ptr,
    needed_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    num_rows,
    vocab_size,
    stride_logits,
    stride_bias,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_NEEDED: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = index < num_rows
    row = tl.where(valid, index, 0)  # rows past the end repeat row 0 and store nothing
    needed = valid
    if HAS_NEEDED:
        needed = valid & (tl.load(needed_ptr + row) != 0)
        if tl.max(needed.to(tl.int32), axis=0) == 0:
            tl.store(token_ptr + index, tl.full([BLOCK_R], -1, tl.int32), mask=valid)
            tl.store(probability_ptr + index, tl.zeros([BLOCK_R], tl.float32), mask=valid)
            return
    x_ptr = logits_ptr + row[:, None] * stride_logits
    b_ptr = bias_ptr + row[:, None] * stride_bias
    scale = exponent_scale(temperature_ptr, row, HAS_TEMPERATURE) + tl.zeros([BLOCK_R], tl.float32)
    greedy = tl.zeros([BLOCK_R], tl.int1)
    if HAS_TEMPERATURE:
        greedy = tl.load(temperature_ptr + row) < GREEDY_BELOW
    best = _largest(x_ptr, b_ptr, vocab_size, BLOCK_R, BLOCK_V, HAS_BIAS)

    lowest = ordered_key(tl.full([BLOCK_R], LOWEST, tl.float32), SHIFT)
    highest = ordered_key(best, SHIFT)
    _, total = count_and_mass_above(
        lowest, x_ptr, b_ptr, best, scale, vocab_size, SHIFT, BLOCK_R, BLOCK_V, HAS_BIAS
    )
    low = tl.where(greedy, highest, lowest)
    high = low
    k = tl.zeros([BLOCK_R], tl.int32) + vocab_size
    limit = total
    if HAS_TOP_K:
        top_k = tl.load(top_k_ptr + row)
        k = tl.where(top_k > 0, tl.minimum(top_k, k), k)
        high = tl.where(k < vocab_size, highest, high)
    if HAS_TOP_P:
        top_p = tl.maximum(tl.load(top_p_ptr + row), 0.0)
        limit = tl.where(top_p < 1.0, top_p.to(tl.float64) * total, total)
        high = tl.where(top_p < 1.0, highest, high)
    threshold = filter_threshold(
        low,
        high,
        k,
        limit,
        x_ptr,
        b_ptr,
        best,
        scale,
        vocab_size,
        SHIFT,
        BLOCK_R,
        BLOCK_V,
        HAS_BIAS,
    )
    # min_p keeps p >= min_p max p, a floor on the exponent.
    floor = tl.full([BLOCK_R], -float("inf"), tl.float32)
    if HAS_MIN_P:
        min_p = tl.minimum(tl.load(min_p_ptr + row), 1.0)
        floor = tl.where(min_p > 0.0, tl.log2(tl.where(min_p > 0.0, min_p, 1.0)), floor)

    kept = tl.zeros([BLOCK_R], tl.float64)
    for start in range(0, vocab_size, BLOCK_V):
        offsets = (start + tl.arange(0, BLOCK_V))[None, :]
        weights = _kept_weights(
            offsets, x_ptr, b_ptr, threshold, floor, best, scale, vocab_size, SHIFT, HAS_BIAS
        )
        kept += tl.sum(weights, axis=1)

    draw = keyed_uniform(
        tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(step_ptr + row)
    )
    target = tl.where(greedy, 0.0, draw) * kept
    # The tile in which the CDF passes the target or, if rounding hides it, the last one with mass.
    reached = tl.zeros([BLOCK_R], tl.float64)
    before = tl.zeros([BLOCK_R], tl.float64)
    tile = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, vocab_size, BLOCK_V):
        offsets = (start + tl.arange(0, BLOCK_V))[None, :]
        weights = _kept_weights(
            offsets, x_ptr, b_ptr, threshold, floor, best, scale, vocab_size, SHIFT, HAS_BIAS
        )
        mass = tl.sum(weights, axis=1)
        here = (reached <= target) & (mass > 0.0)
        tile = tl.where(here, start, tile)
        before = tl.where(here, reached, before)
        reached += mass

    offsets = tile[:, None] + tl.arange(0, BLOCK_V)[None, :]
    weights = _kept_weights(
        offsets, x_ptr, b_ptr, threshold, floor, best, scale, vocab_size, SHIFT, HAS_BIAS
    )
    passed = (before[:, None] + tl.cumsum(weights, axis=1) > target[:, None]) & (weights > 0.0)
    first = tl.min(tl.where(passed, offsets, NO_TOKEN), axis=1)
    last = tl.max(tl.where(weights > 0.0, offsets, 0), axis=1)
    token = tl.where(first == NO_TOKEN, last, first)
    weight = tl.sum(tl.where(offsets == token[:, None], weights, 0.0), axis=1)

    found = needed & (best > LOWEST)
    mass = tl.where(found, tl.where(greedy, total, kept), 1.0)
    probability = (weight / mass).to(tl.float32)
    tl.store(token_ptr + index, tl.where(found, token, -1), mask=valid)
    tl.store(probability_ptr + index, tl.where(found, probability, 0.0), mask=valid)


def row_sample(
    logits: Tensor,
    *,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    temperature: Tensor | None = None,
    bias: Tensor | None = None,
    needed: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> RowSample:
    """Draw a token per row from softmax((logits + bias) / temperature), filtered.

    The filters are those of `logit_filter.py`. A greedy row takes its argmax, whatever the
    filters, and its probability under the unfiltered softmax.

    Args:
        logits, temperature, bias, needed: as in `logits.py`.
        seed: [R] int64. A draw depends on (seed, position, step) and the row's values alone.
        position: [R] int64. step: [R] int32.
        top_k: [R] int32, 0 or less keeps all. top_p: [R] fp32, 1 keeps all. min_p: [R] fp32 in
            [0, 1], 0 keeps all. None keeps all.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or stride is wrong.
    """
    check_logits(logits, temperature, bias, needed)
    (num_rows, vocab_size), device = logits.shape, logits.device
    require(vocab_size > 0, "logits", "an empty vocabulary")
    int64, int32, float32 = (torch.int64,), (torch.int32,), (torch.float32,)
    for name, tensor, dtype in (
        ("seed", seed, int64),
        ("position", position, int64),
        ("step", step, int32),
        ("top_k", top_k, int32),
        ("top_p", top_p, float32),
        ("min_p", min_p, float32),
    ):
        if tensor is not None:
            require_tensor(name, tensor, (num_rows,), dtype, device)
    token = torch.empty(num_rows, dtype=torch.int32, device=device)
    result = RowSample(token, torch.empty(num_rows, dtype=torch.float32, device=device))
    if num_rows == 0:
        return result
    block_v = min(TILE, triton.next_power_of_2(vocab_size))
    block_r = min(TILE // block_v, triton.next_power_of_2(num_rows))
    # An absent tensor is replaced by one that its flag keeps from being read.
    options = (temperature, needed, top_k, top_p, min_p)
    optional = [logits if x is None else as_bytes(x) for x in options]
    _row_sample_kernel[(triton.cdiv(num_rows, block_r),)](
        *result,
        logits,
        logits if bias is None else bias,
        seed,
        position,
        step,
        *optional,
        num_rows,
        vocab_size,
        logits.stride(0),
        bias_row_stride(bias),
        SHIFT=zero_bits(logits.dtype, bias),
        BLOCK_R=block_r,
        BLOCK_V=block_v,
        HAS_BIAS=bias is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_NEEDED=needed is not None,
        HAS_TOP_K=top_k is not None,
        HAS_TOP_P=top_p is not None,
        HAS_MIN_P=min_p is not None,
        num_warps=8,
    )
    return result


def row_sample_reference(
    logits: Tensor,
    *,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    temperature: Tensor | None = None,
    bias: Tensor | None = None,
    needed: Tensor | None = None,
    **filters: Tensor | None,
) -> RowSample:
    """Plain PyTorch `row_sample` in fp64, for rows with a finite logit."""
    shape = {"temperature": temperature, "bias": bias}
    p = filtered_probabilities_reference(logits, **shape, **filters)
    cdf = p.cumsum(dim=-1)
    draw = uniform(seed, position, step)
    token = torch.searchsorted(cdf, draw[:, None] * cdf[:, -1:], right=True)[:, 0]
    if temperature is not None:
        unfiltered = log_probabilities_reference(logits, temperature, bias).exp()
        greedy = temperature < GREEDY_BELOW.value
        token = torch.where(greedy, unfiltered.argmax(dim=-1), token)
        p = torch.where(greedy[:, None], unfiltered, p)
    probability = p.gather(-1, token[:, None])[:, 0].float()
    if needed is not None:
        token = token.where(needed != 0, -1)
        probability = probability.where(needed != 0, 0.0)
    return RowSample(token.int(), probability)
