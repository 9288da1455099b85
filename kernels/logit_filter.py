# SPDX-License-Identifier: Apache-2.0
"""min_p, then top_k, then top_p without a sort: each keeps the logits from a threshold on, and
those of top_k and top_p are found by bisection over the ordered bit patterns of the logits.

Order and boundaries are those of vLLM's PyTorch sampler: min_p keeps probabilities of at least
min_p times the largest; top_k keeps a logit that fewer than k others exceed, so all that equal the
k-th; top_p, on what is left and renormalised, keeps a token while the mass before it is below p. Of
equal logits at the boundary of top_p those of the smallest ids are kept, as many as that takes.

`rows` of the device functions is (pointers to the rows, largest logits, factors from logits to
base-2 exponents, vocabulary size, banned token).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logits import (
    LOWEST,
    columns,
    load_logits,
    log_probabilities_reference,
    rows_of_program,
)

NO_TOKEN = tl.constexpr(0x7FFFFFFF)
# A program reads its rows many times, one tile after another: the next ones are on their way.
STAGES = tl.constexpr(4)


@triton.jit
def ordered_key(x, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 that orders as the float does; SHIFT drops bits that the logits' dtype leaves zero."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def amount_above(  # type: ignore[no-untyped-def]
    key,
    floor,
    rows,
    MASS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
):
    """Per row, fp64: the sum of the weights 2^(scale (x - best)) of the logits above a key, without
    exponents below the floor, or how many logits there are."""
    row_ptr, best, scale, vocab_size, banned_id = rows
    amount = tl.zeros([BLOCK_R, BLOCK_V], tl.float32 if MASS else tl.int32)
    for start in tl.range(0, vocab_size, BLOCK_V, num_stages=STAGES):
        offsets = (start + tl.arange(0, BLOCK_V))[None, :]
        x = load_logits(row_ptr, offsets, vocab_size, banned_id, HAS_BAN)
        above = ordered_key(x, SHIFT) > key[:, None]
        if MASS:
            exponent = (x - best[:, None]) * scale[:, None]
            amount += tl.where(above & (exponent >= floor[:, None]), tl.exp2(exponent), 0.0)
        else:
            amount += above.to(tl.int32)
    return tl.sum(amount.to(tl.float64), axis=1)


@triton.jit
def filter_threshold(  # type: ignore[no-untyped-def]
    low,
    high,
    limit,
    floor,
    rows,
    MASS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
):
    """Per row: the smallest key in [low, high] with less than `limit` above it, logits or mass.
    That holds at the key of the largest logit and stays true as the key grows.
    """
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)  # the floor of their mean, without overflow
        amount = amount_above(middle, floor, rows, MASS, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN)
        searching = low < high
        high = tl.where(searching & (amount < limit), middle, high)
        low = tl.where(searching & (amount >= limit), middle + 1, low)
    return low


@triton.jit
def last_equal(  # type: ignore[no-untyped-def]
    key,
    room,
    rows,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
):
    """Per row: of the logits with a key, the last that top_p keeps: the mass before it, in the
    order of ids, is below `room`."""
    row_ptr, best, scale, vocab_size, banned_id = rows
    last = tl.zeros([BLOCK_R], tl.int32)
    before = tl.zeros([BLOCK_R], tl.int32)
    for start in tl.range(0, vocab_size, BLOCK_V, num_stages=STAGES):
        offsets = (start + tl.arange(0, BLOCK_V))[None, :]
        x = load_logits(row_ptr, offsets, vocab_size, banned_id, HAS_BAN)
        equal = ordered_key(x, SHIFT) == key[:, None]
        rank = before[:, None] + tl.cumsum(equal.to(tl.int32), axis=1) - 1
        weight = tl.exp2((x - best[:, None]) * scale[:, None]).to(tl.float64)
        # The first of them is kept whatever rounding makes of the room.
        kept = equal & ((rank == 0) | (rank.to(tl.float64) * weight < room[:, None]))
        last = tl.maximum(last, tl.max(tl.where(kept, offsets, 0), axis=1))
        before += tl.sum(equal.to(tl.int32), axis=1)
    return last


@triton.jit
def top_k_threshold(  # type: ignore[no-untyped-def]
    top_k,
    lowest,
    floor,
    rows,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
):
    """Per row: the key from which on top_k keeps logits."""
    vocab_size = rows[3]
    k = tl.where(top_k > 0, tl.minimum(top_k, vocab_size), vocab_size).to(tl.int32)
    high = tl.where(k < vocab_size, ordered_key(rows[1], SHIFT), lowest)
    return filter_threshold(lowest, high, k, floor, rows, False, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN)


@triton.jit
def top_p_boundary(  # type: ignore[no-untyped-def]
    top_p,
    lowest,
    floor,
    rows,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BAN: tl.constexpr,
):
    """Per row: the smallest key that top_p keeps of the logits from `lowest` and `floor` on, and
    the last token that it keeps of those with this key."""
    vocab_size = rows[3]
    mass = amount_above(lowest - 1, floor, rows, True, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN)
    limit = tl.maximum(top_p, 0.0).to(tl.float64) * mass
    high = tl.where(top_p < 1.0, ordered_key(rows[1], SHIFT), lowest)
    threshold = filter_threshold(
        lowest, high, limit, floor, rows, True, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN
    )
    above = amount_above(threshold, floor, rows, True, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN)
    last = last_equal(threshold, limit - above, rows, SHIFT, BLOCK_R, BLOCK_V, HAS_BAN)
    return threshold, tl.where(top_p < 1.0, last, vocab_size)


@triton.jit(do_not_specialize=["num_rows", "banned_id"])
def _filter_bounds_kernel(  # type: ignore[no-untyped-def]
    top_ptr,
    floor_ptr,
    threshold_ptr,
    last_ptr,
    logits_ptr,
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
    index, valid, row, needed, scale, x_ptr = rows_of_program(
        logits_ptr, stride_logits, temperature_ptr, needed_ptr, num_rows,
        BLOCK_R, HAS_TEMPERATURE, HAS_NEEDED,
    )  # fmt: skip
    if tl.max(needed.to(tl.int32), axis=0) == 0:
        return
    tops = tl.full([BLOCK_R, BLOCK_V], LOWEST, tl.float32)
    for start in tl.range(0, vocab_size, BLOCK_V, num_stages=STAGES):
        offsets = (start + tl.arange(0, BLOCK_V))[None, :]
        tops = tl.maximum(tops, load_logits(x_ptr, offsets, vocab_size, banned_id, HAS_BAN))
    top = tl.max(tops, axis=1)
    rows = (x_ptr, top, scale, vocab_size, banned_id)
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
    tl.store(top_ptr + index, top, mask=valid)
    tl.store(floor_ptr + index, floor, mask=valid)
    tl.store(threshold_ptr + index, threshold, mask=valid)
    tl.store(last_ptr + index, last, mask=valid)


class FilterBounds(NamedTuple):
    """Which tokens of a row pass the filters, [R] each; anything for rows that are not needed."""

    top: Tensor  # fp32, the largest logit
    floor: Tensor  # fp32, smallest base-2 exponent, relative to that of `top`
    threshold: Tensor  # int32, smallest `ordered_key`
    last: Tensor  # int32, last token with this key


def filter_bounds(
    logits: Tensor,
    filters: tuple[Tensor | None, ...],
    inputs: list[Tensor],
    sizes: tuple[int, ...],
    options: dict[str, Any],
) -> FilterBounds:
    """What the filters keep of each row: a program reads it as often as they ask for.

    Args:
        logits: [R, V].
        filters: `top_k`, `top_p` and `min_p` of `row_sample`.
        inputs, sizes, options: of the kernel: temperature and what is needed, numbers, constants.
    """
    num_rows, device = len(logits), logits.device
    integers = columns(2, num_rows, device, torch.int32)
    bounds = FilterBounds(*columns(2, num_rows, device), *integers)
    _filter_bounds_kernel[(triton.cdiv(num_rows, options["BLOCK_R"]),)](
        *bounds,
        logits,
        *inputs,
        *(logits if x is None else x for x in filters),
        *sizes,
        HAS_TOP_K=filters[0] is not None,
        HAS_TOP_P=filters[1] is not None,
        HAS_MIN_P=filters[2] is not None,
        **options,
    )
    return bounds


def zero_bits(dtype: torch.dtype) -> int:
    """Low bits that are zero in logits of a dtype when converted to fp32."""
    return {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)


def filtered_probabilities_reference(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    banned_id: int | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, by sorting: the fp64 distribution [R, V] that `row_sample` draws from."""
    p = log_probabilities_reference(logits, temperature, banned_id).exp()
    if min_p is not None:
        p = p.where(p >= min_p[:, None] * p.amax(dim=-1, keepdim=True), 0.0)
    ordered, index = p.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        k = top_k.long().where(top_k > 0, p.shape[-1]).clamp(max=p.shape[-1])
        ordered = ordered.where(ordered >= ordered.gather(-1, k[:, None] - 1), 0.0)
    if top_p is not None:
        limit = top_p.double()[:, None] * ordered.sum(dim=-1, keepdim=True)
        kept = (ordered.cumsum(dim=-1) - ordered < limit) | (top_p[:, None] >= 1)
        kept[:, 0] = True
        ordered = ordered.where(kept, 0.0)
    filtered = torch.zeros_like(p).scatter(-1, index, ordered)
    return filtered / filtered.sum(dim=-1, keepdim=True)
