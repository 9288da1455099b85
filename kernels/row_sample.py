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

from .kept_weights import kept_weights, load_bounds, partial_sums_kernel
from .logit_filter import NO_TOKEN, filter_bounds, filtered_probabilities_reference, zero_bits
from .logits import (
    LN_2,
    LOWEST,
    TILE,
    check_logits,
    columns,
    load_logits,
    row_parts,
    rows_of_program,
    sound_rows,
)
from .validation import as_bytes, require_tensor


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


@triton.jit(do_not_specialize=["num_rows", "banned_id", "num_tiles"])
def _final_sample_kernel(  # type: ignore[no-untyped-def]
    token_ptr,
    probability_ptr,
    entropy_ptr,
    margin_ptr,
    draw_ptr,
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
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_BAN: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_NEEDED: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
):
    index, valid, row, needed, scale, x_ptr = rows_of_program(
        logits_ptr, stride_logits, temperature_ptr, needed_ptr, num_rows,
        BLOCK_R, HAS_TEMPERATURE, HAS_NEEDED,
    )  # fmt: skip
    if tl.max(needed.to(tl.int32), axis=0) == 0:
        zero = tl.zeros([BLOCK_R], tl.float32)
        tl.store(token_ptr + index, tl.full([BLOCK_R], -1, tl.int32), mask=valid)
        tl.store(probability_ptr + index, zero, mask=valid)
        tl.store(entropy_ptr + index, zero, mask=valid)
        tl.store(margin_ptr + index, zero, mask=valid)
        return
    # Of rows that are not needed nothing was stored.
    tile = tl.arange(0, BLOCK_T)[None, :]
    place = (row[:, None] * num_tiles + tile) * 3
    mask = (tile < num_tiles) & needed[:, None]
    tops = tl.load(extent_ptr + place, mask=mask, other=LOWEST)
    seconds = tl.load(extent_ptr + place + 1, mask=mask, other=LOWEST)
    bad = tl.max(tl.load(extent_ptr + place + 2, mask=mask, other=0.0), axis=1) > 0.0
    masses = tl.load(sums_ptr + place, mask=mask, other=0.0)
    weighted = tl.load(sums_ptr + place + 1, mask=mask, other=0.0)
    count = tl.sum(tl.load(sums_ptr + place + 2, mask=mask, other=0.0), axis=1)

    best = tl.max(tops, axis=1)
    winner = tops == best[:, None]
    rest = tl.max(tl.where(winner, LOWEST, tops), axis=1)
    tie = tl.sum(winner.to(tl.int32), axis=1) > 1
    runner_up = tl.maximum(tl.max(seconds, axis=1), tl.where(tie, best, rest))
    shift = (tops - best[:, None]) * scale[:, None]
    decay = tl.exp2(shift).to(tl.float64)
    weighted = tl.sum(decay * (weighted + shift.to(tl.float64) * masses), axis=1)
    masses = decay * masses
    kept = tl.sum(masses, axis=1)

    # The tile in which the sum passes the target or, if rounding hides it, the last with mass.
    target = tl.load(draw_ptr + row) * kept
    before = tl.cumsum(masses, axis=1) - masses
    here = (before <= target[:, None]) & (masses > 0.0)
    chosen = tl.max(tl.where(here, tile, 0), axis=1)
    own = tile == chosen[:, None]
    decay = tl.sum(tl.where(own, decay, 0.0), axis=1)
    target = (target - tl.sum(tl.where(own, before, 0.0), axis=1)) / decay
    own_best = tl.sum(tl.where(own, tops, 0.0), axis=1)
    offsets = chosen[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    x = load_logits(x_ptr, offsets, vocab_size, banned_id, HAS_BAN)
    pointers = (top_ptr, floor_ptr, threshold_ptr, last_ptr)
    bounds = load_bounds(pointers, row, own_best, vocab_size, SHIFT, HAS_BOUNDS)
    _exponent, weights = kept_weights(x, offsets, own_best, scale, bounds, SHIFT)
    passed = (tl.cumsum(weights, axis=1) > target[:, None]) & (weights > 0.0)
    first = tl.min(tl.where(passed, offsets, NO_TOKEN), axis=1)
    last = tl.max(tl.where(weights > 0.0, offsets, 0), axis=1)
    token = tl.where(first == NO_TOKEN, last, first)
    weight = tl.sum(tl.where(offsets == token[:, None], weights, 0.0), axis=1)

    found = (best > LOWEST) & (best < float("inf")) & (~bad)
    kept = tl.where(found, kept, 1.0)
    entropy = tl.maximum(tl.log2(kept.to(tl.float32)) - (weighted / kept).to(tl.float32), 0.0)
    second = tl.where(count > 1.0, tl.exp2((runner_up - best) * scale), 0.0)
    margin = (1.0 - second) / kept.to(tl.float32)
    unsound = tl.where(needed, float("inf"), 0.0)
    found = found & needed
    tl.store(token_ptr + index, tl.where(found, token, tl.where(needed, 0, -1)), mask=valid)
    probability = (weight * decay / kept).to(tl.float32)
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
    options = {
        "SHIFT": zero_bits(logits.dtype),
        "BLOCK_R": TILE // block_v,
        "BLOCK_V": block_v,
        "HAS_BAN": banned_id is not None,
        "HAS_TEMPERATURE": temperature is not None,
        "HAS_NEEDED": needed is not None,
        "num_warps": 8,
    }
    # An absent tensor is replaced by one that its flag keeps from being read.
    inputs = [logits if x is None else as_bytes(x) for x in (temperature, needed)]
    sizes: tuple[int, ...] = (
        num_rows,
        vocab_size,
        -1 if banned_id is None else banned_id,
        logits.stride(0),
    )
    bounds: tuple[Tensor, ...] = (logits,) * 4
    filters = (top_k, top_p, min_p)
    filtered = any(x is not None for x in filters)
    if filtered:
        bounds = filter_bounds(logits, filters, inputs, sizes, options)
    options["HAS_BOUNDS"] = filtered
    num_parts, tiles_per_part = row_parts(num_rows, vocab_size, device)
    num_tiles = triton.cdiv(vocab_size, TILE)
    extent = torch.empty((num_rows, num_tiles, 3), device=device)
    sums = torch.empty((num_rows, num_tiles, 3), dtype=torch.float64, device=device)
    blocks = triton.cdiv(num_rows, TILE // block_v)
    inputs = [logits, *bounds, *inputs]
    sizes = (*sizes, num_tiles)
    partial_sums_kernel[(blocks, num_parts)](
        extent, sums, *inputs, *sizes, tiles_per_part, **options
    )
    _final_sample_kernel[(blocks,)](
        *result,
        draw,
        extent,
        sums,
        *inputs,
        *sizes,
        BLOCK_T=triton.next_power_of_2(num_tiles),
        **options,
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
