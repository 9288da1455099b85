# SPDX-License-Identifier: Apache-2.0
"""One denoise decision: which masked positions of every canvas to fill, filling them, and what is
left to do. One launch for all requests, nothing read back to the host.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .validation import as_bytes, require, require_tensor, values_are_checked

MAX_CANVAS_LENGTH = 256  # positions are ranked by comparing all pairs in registers


class SelectionRule(IntEnum):
    """Which candidates are filled besides the one of the highest score.

    With the candidates in order of falling score, H their entropies and p their probabilities:
    """

    THRESHOLD = 0
    """Every one with p > parameter (NBDiff; Fast-dLLM, arXiv 2505.22618)."""
    FACTOR = 1
    """The longest run of n with (n + 1)(1 - min p) < parameter (Fast-dLLM, theorem 1)."""
    ENTROPY_BOUND = 2
    """The longest run with sum H - max H <= parameter, nats (EB-Sampler, arXiv 2505.24857)."""
    ENTROPY_THRESHOLD = 3
    """Every one with H <= parameter, nats (dParallel, arXiv 2509.26488)."""


class CanvasUpdate(NamedTuple):
    """Per request of canvas [N, L], after filling."""

    accepted: Tensor
    """[N, L] bool: positions that took their token in this call."""
    num_filled: Tensor
    """[N] int32: of them, positions whose token is not the mask."""
    num_masked: Tensor
    """[N] int32: masks left in the canvas."""
    finished: Tensor
    """[N] bool: no mask is left; the next forward commits the block."""
    ended: Tensor
    """[N] bool: an eos token with no mask before it; the request is over, no commit needed."""


# Triton wants the globals of a kernel wrapped.
_FACTOR = tl.constexpr(SelectionRule.FACTOR.value)
_ENTROPY_BOUND = tl.constexpr(SelectionRule.ENTROPY_BOUND.value)
_ENTROPY_THRESHOLD = tl.constexpr(SelectionRule.ENTROPY_THRESHOLD.value)


@triton.jit(do_not_specialize=["mask_token_id", "num_eos"])
def _canvas_update_kernel(  # type: ignore[no-untyped-def]
    accepted_ptr,
    num_filled_ptr,
    num_masked_ptr,
    finished_ptr,
    ended_ptr,
    canvas_ptr,
    token_ptr,
    probability_ptr,
    score_ptr,
    entropy_ptr,
    rule_ptr,
    parameter_ptr,
    sub_block_length_ptr,
    active_ptr,
    slot_ptr,
    quota_ptr,
    eos_ptr,
    mask_token_id,
    num_eos,
    length,
    stride_canvas,
    stride_token,
    stride_probability,
    stride_score,
    stride_entropy,
    BLOCK_L: tl.constexpr,
    BLOCK_EOS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_QUOTA: tl.constexpr,
    COMPACT: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = request
    if HAS_SLOT:
        slot = tl.load(slot_ptr + request)
    i = tl.arange(0, BLOCK_L)
    valid = i < length
    canvas_row = canvas_ptr + slot * stride_canvas
    canvas = tl.load(canvas_row + i, mask=valid, other=0)
    masked = valid & (canvas == mask_token_id)

    # Candidates: the masks up to the end of the sub-block that holds the quota-th of them.
    sub_block_length = tl.load(sub_block_length_ptr + slot)
    quota = 1
    if HAS_QUOTA:
        quota = tl.load(quota_ptr + request)
    first = tl.min(tl.where(masked, i, length), axis=0)
    count = tl.cumsum(masked.to(tl.int32), axis=0)
    wanted = tl.minimum(quota, tl.max(count, axis=0))
    last = tl.sum(((count < wanted) & valid).to(tl.int32), axis=0)
    end = (last // sub_block_length + 1) * sub_block_length
    if HAS_ACTIVE:
        end = tl.where(tl.load(active_ptr + request) != 0, end, 0)
    candidate = masked & (i < end)

    column = i
    if COMPACT:
        column = i - first
    p_row = probability_ptr + request * stride_probability
    p = tl.load(p_row + column, mask=candidate, other=0.0)
    score = tl.load(score_ptr + request * stride_score + column, mask=candidate, other=0.0)
    entropy = tl.load(entropy_ptr + request * stride_entropy + column, mask=candidate, other=0.0)

    # before[i, j]: candidate j precedes i in falling score, the leftmost of equals first.
    mine = score[:, None]
    other = tl.where(candidate, score, -float("inf"))[None, :]
    leftward = i[None, :] < i[:, None]
    before = candidate[None, :] & ((other > mine) | ((other == mine) & leftward))
    rank = tl.sum(before.to(tl.int32), axis=1)
    run = before | (i[None, :] == i[:, None])  # the candidates up to and with i

    rule = tl.load(rule_ptr + slot)
    parameter = tl.load(parameter_ptr + slot)
    lowest_p = tl.min(tl.where(run, p[None, :], 1.0), axis=1)
    run_entropy = tl.sum(tl.where(run, entropy[None, :], 0.0), axis=1)
    top_entropy = tl.max(tl.where(run, entropy[None, :], -float("inf")), axis=1)
    passes = p > parameter
    passes = tl.where(rule == _FACTOR, (rank + 2) * (1.0 - lowest_p) < parameter, passes)
    passes = tl.where(rule == _ENTROPY_BOUND, run_entropy - top_entropy <= parameter, passes)
    passes = tl.where(rule == _ENTROPY_THRESHOLD, entropy <= parameter, passes)
    accepted = candidate & (passes | (rank < quota))

    token = tl.load(token_ptr + request * stride_token + column, mask=accepted, other=0)
    token = token.to(canvas.dtype)
    canvas = tl.where(accepted, token, canvas)
    filled = accepted & (token != mask_token_id)
    tl.store(num_filled_ptr + request, tl.sum(filled.to(tl.int32), axis=0))
    tl.store(canvas_row + i, canvas, mask=accepted)
    tl.store(accepted_ptr + request * length + i, accepted, mask=valid)

    masked = valid & (canvas == mask_token_id)
    num_masked = tl.sum(masked.to(tl.int32), axis=0)
    first = tl.min(tl.where(masked, i, length), axis=0)
    e = tl.arange(0, BLOCK_EOS)
    eos = tl.load(eos_ptr + e, mask=e < num_eos, other=0)
    is_eos = (canvas[:, None] == eos[None, :]) & (e < num_eos)[None, :] & (i < first)[:, None]
    tl.store(num_masked_ptr + request, num_masked)
    tl.store(finished_ptr + request, num_masked == 0)
    tl.store(ended_ptr + request, tl.max(tl.max(is_eos.to(tl.int32), axis=1), axis=0) != 0)


def _validate(
    canvas: Tensor,
    per_position: dict[str, Tensor],
    rule: Tensor,
    parameter: Tensor,
    sub_block_length: Tensor,
    eos_token_ids: Tensor,
    optional: dict[str, Tensor | None],
    compact: bool,
    check_values: bool | None,
) -> None:
    device = canvas.device
    int32, float32 = (torch.int32,), (torch.float32,)
    require_tensor("canvas", canvas, (None, None), (torch.int32, torch.int64), device)
    num_slots, length = canvas.shape
    slot = optional["slot"]
    num_requests = num_slots if slot is None else slot.numel()
    fits = 1 <= length <= MAX_CANVAS_LENGTH
    require(fits, "canvas", f"length {length} outside [1, {MAX_CANVAS_LENGTH}]")
    columns = per_position["token"].shape[-1] if compact else length
    for name, tensor in per_position.items():
        dtype = int32 if name == "token" else float32
        require_tensor(name, tensor, (num_requests, columns), dtype, device)
    require_tensor("rule", rule, (num_slots,), int32, device)
    require_tensor("parameter", parameter, (num_slots,), float32, device)
    require_tensor("sub_block_length", sub_block_length, (num_slots,), int32, device)
    require_tensor("eos_token_ids", eos_token_ids, (None,), int32, device)
    dtypes = {"active": (torch.int32, torch.bool), "slot": (torch.int64,), "quota": int32}
    for name, value in optional.items():
        if value is not None:
            require_tensor(name, value, (num_requests,), dtypes[name], device)
    if values_are_checked(check_values, device):
        known = torch.tensor(list(SelectionRule), device=device)
        require(bool(torch.isin(rule, known).all()), "rule", "not a SelectionRule")
        require(bool((sub_block_length > 0).all()), "sub_block_length", "must be positive")
        if slot is not None:
            inside = bool(((slot >= 0) & (slot < num_slots)).all())
            require(inside, "slot", f"outside [0, {num_slots})")


def canvas_update(
    canvas: Tensor,
    token: Tensor,
    probability: Tensor,
    score: Tensor,
    entropy: Tensor,
    *,
    mask_token_id: int,
    eos_token_ids: Tensor,
    rule: Tensor,
    parameter: Tensor,
    sub_block_length: Tensor,
    active: Tensor | None = None,
    slot: Tensor | None = None,
    quota: Tensor | None = None,
    compact: bool = False,
    check_values: bool | None = None,
) -> CanvasUpdate:
    """Fill masked positions of each canvas's leftmost unfinished sub-block, in place.

    The candidates of the highest scores (the leftmost of equals), `quota` of them, are always
    filled, others as the request's rule says. A quota larger than what the sub-block has left
    takes in the following ones. A position filled with the mask token stays masked.

    Args:
        canvas: [N, L] int32 or int64, L at most 256; the only argument written.
        token: [N, L] int32, proposed for each position. Read, like the next three, at the
            candidates only.
        probability, score, entropy: [N, L] fp32: of the proposed token; what candidates are ordered
            by (probability, negative entropy or margin); of the distribution, in nats.
        mask_token_id: id that marks a position as masked.
        eos_token_ids: [E] int32, may be empty.
        rule: [N] int32 of `SelectionRule`; parameter: [N] fp32, the rule's.
        sub_block_length: [N] int32, positions per sub-block.
        active: [N] int32 or bool; a canvas of 0 is left as it is. None: all are active.
        slot: [B] int64: the N of this call are B requests whose canvas and options are those rows
            of `canvas`, `rule`, `parameter` and `sub_block_length`. None: all rows in order.
        quota: [N] int32, at least 1. None: 1.
        compact: `token` and the next three have the columns from the first masked one on, as
            many as are candidates, instead of all L.
        check_values: read rule, sub_block_length and slot back and check them (a device
            synchronisation); None checks on CPU only.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong.
    """
    positions = {"token": token, "probability": probability, "score": score, "entropy": entropy}
    optional = {"active": active, "slot": slot, "quota": quota}
    _validate(
        canvas,
        positions,
        rule,
        parameter,
        sub_block_length,
        eos_token_ids,
        optional,
        compact,
        check_values,
    )
    num_requests, length = len(token), canvas.shape[1]
    result = CanvasUpdate(
        torch.empty((num_requests, length), dtype=torch.bool, device=canvas.device),
        torch.empty(num_requests, dtype=torch.int32, device=canvas.device),
        torch.empty(num_requests, dtype=torch.int32, device=canvas.device),
        torch.empty(num_requests, dtype=torch.bool, device=canvas.device),
        torch.empty(num_requests, dtype=torch.bool, device=canvas.device),
    )
    if num_requests == 0:
        return result
    block_l = triton.next_power_of_2(length)
    _canvas_update_kernel[(num_requests,)](
        *result,
        canvas,
        *positions.values(),
        rule,
        parameter,
        sub_block_length,
        rule if active is None else as_bytes(active),
        rule if slot is None else slot,
        rule if quota is None else quota,
        eos_token_ids,
        mask_token_id,
        eos_token_ids.shape[0],
        length,
        canvas.stride(0),
        *(tensor.stride(0) for tensor in positions.values()),
        BLOCK_L=block_l,
        BLOCK_EOS=max(1, triton.next_power_of_2(eos_token_ids.shape[0])),
        HAS_ACTIVE=active is not None,
        HAS_SLOT=slot is not None,
        HAS_QUOTA=quota is not None,
        COMPACT=compact,
        num_warps=min(8, max(1, block_l * block_l // 1024)),
    )
    return result


def _run_length(rule: int, parameter: float, p: list[float], entropy: list[float]) -> int:
    """How many candidates, in falling score, FACTOR or ENTROPY_BOUND fills."""
    for n in range(1, len(p) + 1):
        if rule == SelectionRule.FACTOR:
            passes = (n + 1) * (1 - min(p[:n])) < parameter
        else:
            passes = sum(entropy[:n]) - max(entropy[:n]) <= parameter
        if not passes:
            return max(1, n - 1)
    return len(p)


def canvas_update_reference(
    canvas: Tensor,
    token: Tensor,
    probability: Tensor,
    score: Tensor,
    entropy: Tensor,
    *,
    mask_token_id: int,
    eos_token_ids: Tensor,
    rule: Tensor,
    parameter: Tensor,
    sub_block_length: Tensor,
    active: Tensor | None = None,
    slot: Tensor | None = None,
    quota: Tensor | None = None,
    compact: bool = False,
) -> CanvasUpdate:
    """Plain PyTorch and Python `canvas_update`, one request at a time by sorting."""
    slots = torch.arange(len(canvas)) if slot is None else slot
    accepted = torch.zeros(len(slots), canvas.shape[1], dtype=torch.bool)
    num_filled = torch.zeros(len(slots), dtype=torch.int32)
    for request, row_index in enumerate(slots.tolist()):
        row = canvas[row_index]
        masked = (row == mask_token_id).nonzero()[:, 0]
        if len(masked) == 0 or (active is not None and not active[request]):
            continue
        least = 1 if quota is None else min(int(quota[request]), len(masked))
        size = int(sub_block_length[row_index])
        candidates = masked[masked < (int(masked[least - 1]) // size + 1) * size]
        given = candidates - masked[0] if compact else candidates
        rank = score[request, given].argsort(descending=True, stable=True)
        p, h = probability[request, given[rank]], entropy[request, given[rank]]
        limit, kind = float(parameter[row_index]), int(rule[row_index])
        if kind in (SelectionRule.FACTOR, SelectionRule.ENTROPY_BOUND):
            takes = torch.arange(len(rank)) < _run_length(kind, limit, p.tolist(), h.tolist())
        else:
            takes = p > limit if kind == SelectionRule.THRESHOLD else h <= limit
        takes[:least] = True
        taken = rank[takes]
        accepted[request, candidates[taken]] = True
        row[candidates[taken]] = token[request, given[taken]].to(row.dtype)
        num_filled[request] = (row[candidates[taken]] != mask_token_id).sum()
    canvases = canvas[slots]
    still_masked = canvases == mask_token_id
    mask_before = still_masked.cumsum(dim=1) > 0
    ended = (torch.isin(canvases, eos_token_ids) & ~mask_before).any(dim=1)
    num_masked = still_masked.sum(dim=1).int()
    return CanvasUpdate(accepted, num_filled, num_masked, num_masked == 0, ended)
