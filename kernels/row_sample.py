# SPDX-License-Identifier: Apache-2.0
"""One token per row of logits, drawn by inverse CDF from the tempered and filtered distribution.

The uniforms have 53 bits and the CDF is summed in fp64, so rare tokens keep their probability,
which fp32 Gumbel noise takes from them (arXiv 2409.02908).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logit_filter import (
    NO_TOKEN,
    filtered_probabilities_reference,
    ordered_key,
    top_k_threshold,
    top_p_boundary,
    zero_bits,
)
from .logits import (
    LN_2,
    LOWEST,
    check_logits,
    columns,
    exponent_scale,
    load_logits,
    sound_rows,
    two_largest,
)
from .validation import as_bytes, require_tensor

TILE = 4096  # logits per step of a program: one long row's part, or several short rows


class RowSample(NamedTuple):
    """Per row of logits [R, V]; p is the distribution that its token was drawn from. All [R].

    Of a skipped row the token is -1 and the rest 0.
    """

    token: Tensor
    """int32: the token drawn."""
    probability: Tensor
    """fp32: p[token]."""
    entropy: Tensor
    """fp32: -sum p ln p, nats."""
    margin: Tensor
    """fp32: the largest probability minus the second largest."""


@triton.jit
def _kept_weights(offsets, rows, bounds, SHIFT: tl.constexpr, HAS_BAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Exponents scale (x - best), and 2^ them in fp64 of the tokens that pass the filters, 0 of the
    others; `bounds` is (smallest key, last token with this key, smallest exponent)."""
    row_ptr, best, scale, vocab_size, banned_id = rows
    threshold, last, floor = bounds
    x = load_logits(row_ptr, offsets, vocab_size, banned_id, HAS_BAN)
    exponent = (x - best[:, None]) * scale[:, None]
    key = ordered_key(x, SHIFT)
    kept = (key > threshold[:, None]) | ((key == threshold[:, None]) & (offsets <= last[:, None]))
    kept = kept & (x > LOWEST) & (exponent >= floor[:, None])
    return exponent, tl.where(kept, tl.exp2(exponent), 0.0).to(tl.float64)


@triton.jit
def _kept_sums(  # type: ignore[no-untyped-def]
    rows,
    bounds,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
):
    """Per row: sum of the kept weights, of their products with the exponents, and their number."""
    vocab_size = rows[3]
    kept = tl.zeros([BLOCK_R], tl.float64)
    weighted = tl.zeros([BLOCK_R], tl.float64)
    count = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, vocab_size, BLOCK_V):
        offsets = (start + tl.arange(0, BLOCK_V))[None, :]
        exponent, weights = _kept_weights(offsets, rows, bounds, SHIFT, HAS_BAN)
        kept += tl.sum(weights, axis=1)
        weighted += tl.sum(exponent.to(tl.float64) * weights, axis=1)
        count += tl.sum((weights > 0.0).to(tl.int32), axis=1)
    return kept, weighted, count


@triton.jit
def _invert(  # type: ignore[no-untyped-def]
    target,
    rows,
    bounds,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
):
    """Per row: the token at which the sum of the kept weights passes the target, and its weight."""
    vocab_size = rows[3]
    # The tile in which the sum passes the target or, if rounding hides it, the last one with mass.
    reached = tl.zeros([BLOCK_R], tl.float64)
    before = tl.zeros([BLOCK_R], tl.float64)
    tile = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, vocab_size, BLOCK_V):
        offsets = (start + tl.arange(0, BLOCK_V))[None, :]
        _exponent, weights = _kept_weights(offsets, rows, bounds, SHIFT, HAS_BAN)
        mass = tl.sum(weights, axis=1)
        here = (reached <= target) & (mass > 0.0)
        tile = tl.where(here, start, tile)
        before = tl.where(here, reached, before)
        reached += mass

    offsets = tile[:, None] + tl.arange(0, BLOCK_V)[None, :]
    _exponent, weights = _kept_weights(offsets, rows, bounds, SHIFT, HAS_BAN)
    passed = (before[:, None] + tl.cumsum(weights, axis=1) > target[:, None]) & (weights > 0.0)
    first = tl.min(tl.where(passed, offsets, NO_TOKEN), axis=1)
    last = tl.max(tl.where(weights > 0.0, offsets, 0), axis=1)
    token = tl.where(first == NO_TOKEN, last, first)
    return token, tl.sum(tl.where(offsets == token[:, None], weights, 0.0), axis=1)


@triton.jit(do_not_specialize=["num_rows", "banned_id"])
def _row_sample_kernel(  # type: ignore[no-untyped-def]
    token_ptr,
    probability_ptr,
    entropy_ptr,
    margin_ptr,
    logits_ptr,
    draw_ptr,
    temperature_ptr,
    needed_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    num_rows,
    vocab_size,
    banned_id,
    stride_logits,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
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
            zero = tl.zeros([BLOCK_R], tl.float32)
            tl.store(token_ptr + index, tl.full([BLOCK_R], -1, tl.int32), mask=valid)
            tl.store(probability_ptr + index, zero, mask=valid)
            tl.store(entropy_ptr + index, zero, mask=valid)
            tl.store(margin_ptr + index, zero, mask=valid)
            return
    x_ptr = logits_ptr + row[:, None] * stride_logits
    scale = exponent_scale(temperature_ptr, row, HAS_TEMPERATURE) + tl.zeros([BLOCK_R], tl.float32)
    best, runner_up, bad = two_largest(x_ptr, vocab_size, banned_id, BLOCK_R, BLOCK_V, HAS_BAN)

    rows = (x_ptr, best, scale, vocab_size, banned_id)

    # min_p keeps p >= min_p max p, a floor on the exponent.
    floor = tl.full([BLOCK_R], -float("inf"), tl.float32)
    if HAS_MIN_P:
        min_p = tl.minimum(tl.load(min_p_ptr + row), 1.0)
        floor = tl.where(min_p > 0.0, tl.log2(tl.where(min_p > 0.0, min_p, 1.0)), floor)
    threshold = ordered_key(tl.full([BLOCK_R], LOWEST, tl.float32), SHIFT)
    last = tl.zeros([BLOCK_R], tl.int32) + vocab_size
    if HAS_TOP_K:
        threshold = top_k_threshold(
            tl.load(top_k_ptr + row), threshold, floor, rows, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN
        )
    if HAS_TOP_P:
        threshold, last = top_p_boundary(
            tl.load(top_p_ptr + row), threshold, floor, rows, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN
        )
    bounds = (threshold, last, floor)
    kept, weighted, count = _kept_sums(rows, bounds, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN)
    target = tl.load(draw_ptr + row) * kept
    token, weight = _invert(target, rows, bounds, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN)

    found = (best > LOWEST) & (best < float("inf")) & (~bad)
    kept = tl.where(found, kept, 1.0)
    entropy = tl.maximum(tl.log2(kept.to(tl.float32)) - (weighted / kept).to(tl.float32), 0.0)
    second = tl.where(count > 1, tl.exp2((runner_up - best) * scale), 0.0)
    margin = (1.0 - second) / kept.to(tl.float32)
    unsound = tl.where(needed, float("inf"), 0.0)
    found = found & needed
    tl.store(token_ptr + index, tl.where(found, token, tl.where(needed, 0, -1)), mask=valid)
    probability = (weight / kept).to(tl.float32)
    tl.store(probability_ptr + index, tl.where(found, probability, 0.0), mask=valid)
    tl.store(entropy_ptr + index, tl.where(found, entropy * LN_2, unsound), mask=valid)
    tl.store(margin_ptr + index, tl.where(found, margin, 0.0), mask=valid)


def row_sample(
    logits: Tensor,
    *,
    draw: Tensor,
    temperature: Tensor | None = None,
    banned_id: int | None = None,
    needed: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> RowSample:
    """Draw a token per row from softmax(logits / temperature), filtered as in `logit_filter.py`.

    Args:
        logits, temperature, banned_id, needed: as in `logits.py`, but that no row is greedy: one
            below `GREEDY_BELOW` is drawn at temperature 1.
        draw: [R] fp64, uniform in [0, 1), at which the CDF is inverted.
        top_k: [R] int32 or int64, 0 or less keeps all. top_p: [R] fp32, 1 keeps all. min_p: [R]
            fp32 in [0, 1], 0 keeps all. None keeps all.

    Raises:
        ValueError: naming the argument whose shape, dtype, device, stride or value is wrong.
    """
    check_logits(logits, temperature, banned_id, needed)
    (num_rows, vocab_size), device = logits.shape, logits.device
    float32 = (torch.float32,)
    for name, tensor, dtypes in (
        ("draw", draw, (torch.float64,)),
        ("top_k", top_k, (torch.int32, torch.int64)),
        ("top_p", top_p, float32),
        ("min_p", min_p, float32),
    ):
        if tensor is not None:
            require_tensor(name, tensor, (num_rows,), dtypes, device)
    token = torch.empty(num_rows, dtype=torch.int32, device=device)
    result = RowSample(token, *columns(3, num_rows, device))
    if num_rows == 0:
        return result
    block_v = min(TILE, triton.next_power_of_2(vocab_size))
    block_r = TILE // block_v
    # An absent tensor is replaced by one that its flag keeps from being read.
    options = (temperature, needed, top_k, top_p, min_p)
    _row_sample_kernel[(triton.cdiv(num_rows, block_r),)](
        *result,
        logits,
        draw,
        *(logits if x is None else as_bytes(x) for x in options),
        num_rows,
        vocab_size,
        -1 if banned_id is None else banned_id,
        logits.stride(0),
        SHIFT=zero_bits(logits.dtype),
        BLOCK_R=block_r,
        BLOCK_V=block_v,
        HAS_BAN=banned_id is not None,
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
    draw: Tensor,
    temperature: Tensor | None = None,
    banned_id: int | None = None,
    needed: Tensor | None = None,
    **filters: Tensor | None,
) -> RowSample:
    """Plain PyTorch `row_sample` in fp64."""
    p = filtered_probabilities_reference(
        logits, temperature=temperature, banned_id=banned_id, **filters
    )
    cdf = p.cumsum(dim=-1)
    token = torch.searchsorted(cdf, draw[:, None] * cdf[:, -1:], right=True)
    token = token.clamp(max=p.shape[-1] - 1)
    top_2 = torch.nn.functional.pad(p, (0, 1)).topk(2, dim=-1).values
    fields = [
        token[:, 0].int(),
        p.gather(-1, token)[:, 0].float(),
        torch.special.entr(p).sum(dim=-1).float(),
        (top_2[:, 0] - top_2[:, 1]).float(),
    ]
    sound = sound_rows(logits, banned_id)
    fields = [x.where(sound, v) for x, v in zip(fields, (0, 0.0, torch.inf, 0.0), strict=True)]
    if needed is not None:
        fields = [x.where(needed != 0, -1 if i == 0 else 0) for i, x in enumerate(fields)]
    return RowSample(*fields)
