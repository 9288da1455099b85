# SPDX-License-Identifier: Apache-2.0
"""The end of a forward: commits and verifies text, begins canvases, says what is emitted and what
the next forward of each request is. One launch for all requests, nothing read back to the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .canvas_rows import CanvasRows
from .canvas_table import (
    CanvasTable,
    Mode,
    ScheduledBatch,
    canvas_width,
    canvas_width_reference,
)
from .validation import require_tensor, values_are_checked

_BEGIN = tl.constexpr(Mode.BEGIN.value)
_FILL = tl.constexpr(Mode.FILL.value)
_TEXT = tl.constexpr(Mode.TEXT.value)
PAD = tl.constexpr(0)  # token of columns past a canvas's width: any but the mask


class Emission(NamedTuple):
    """What a forward gave B requests."""

    tokens: Tensor
    """[B, L] int64, the emitted ones first."""
    num_emitted: Tensor
    """[B] int32: tokens whose KV is final now."""
    num_rejected: Tensor
    """[B] int32: scheduled canvas columns that were not emitted."""


@triton.jit(do_not_specialize=["mask_token_id", "max_model_len", "length", "num_rows"])
def _canvas_advance_kernel(  # type: ignore[no-untyped-def]
    emitted_ptr,
    num_emitted_ptr,
    num_rejected_ptr,
    tokens_ptr,
    causal_ptr,
    step_ptr,
    block_length_ptr,
    sub_block_length_ptr,
    max_steps_ptr,
    verifies_ptr,
    last_position_ptr,
    slot_ptr,
    kind_ptr,
    query_start_ptr,
    seq_len_ptr,
    mode_ptr,
    needed_ptr,
    num_filled_ptr,
    token_ptr,
    probability_ptr,
    mask_token_id,
    max_model_len,
    length,
    num_rows,
    stride_tokens,
    BLOCK_L: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + request)
    mode = tl.load(mode_ptr + request)
    rows = tl.load(query_start_ptr + request + 1) - tl.load(query_start_ptr + request)
    end = tl.load(seq_len_ptr + request)
    start = end - rows
    verifies = tl.load(verifies_ptr + slot) != 0
    width = canvas_width(
        slot, start, max_model_len, block_length_ptr, verifies_ptr, last_position_ptr
    )
    i = tl.arange(0, BLOCK_L)
    valid = i < length
    row = tokens_ptr + slot * stride_tokens
    canvas = tl.load(row + i, mask=valid, other=0)
    after = tl.load(row + i + 1, mask=i + 1 < length, other=0)
    in_rows = i < num_rows
    line = request * num_rows + i
    needed = tl.load(needed_ptr + line, mask=in_rows, other=0)
    proposed = tl.load(token_ptr + line, mask=in_rows & (needed != 0), other=0).to(tl.int64)
    masked = valid & (i < width) & (canvas == mask_token_id)
    first = tl.min(tl.where(masked, i, width), axis=0)

    if mode == _FILL:
        # A step whose best tokens were all the mask fills its likeliest column with another one.
        if tl.load(num_filled_ptr + request) == 0:
            p = tl.load(probability_ptr + line, mask=needed == _FILL, other=-1.0)
            best = tl.min(tl.where((p == tl.max(p, axis=0)) & (needed == _FILL), i, BLOCK_L))
            chosen = tl.sum(tl.where(i == best, proposed, 0), axis=0)
            tl.store(row + first + best, chosen)
            masked = masked & (i != first + best)
        step = tl.load(step_ptr + slot) + 1
        drafted = verifies & (step >= tl.load(max_steps_ptr + slot))
        full = tl.sum(masked.to(tl.int32), axis=0) == 0
        tl.store(step_ptr + slot, step)
        tl.store(causal_ptr + slot, (full | drafted).to(tl.int32))

    count = 0
    if (mode == _TEXT) | (mode == _BEGIN):
        seed = tl.sum(tl.where(i == 0, proposed, 0), axis=0)
        begin = end
        if mode == _TEXT:
            # What the model says follows each column; of a commit only the last one is asked.
            count = tl.minimum(first, width)
            if verifies:
                wrong = (proposed != after) & (i < count - 1)
                count = tl.min(tl.where(wrong, i + 1, count), axis=0)
                seed = tl.sum(tl.where(i == count - 1, proposed, 0), axis=0)
            begin = start + count
            tl.store(emitted_ptr + request * length + i, canvas, mask=i < count)
        next_width = canvas_width(
            slot, begin, max_model_len, block_length_ptr, verifies_ptr, last_position_ptr
        )
        fresh = tl.where(i < next_width, mask_token_id, PAD).to(tl.int64)
        fresh = tl.where((i == 0) & (next_width > 0), seed, fresh)
        tl.store(row + i, fresh, mask=valid)
        tl.store(step_ptr + slot, 0)
        tl.store(causal_ptr + slot, (next_width <= 1).to(tl.int32))
    is_canvas = tl.load(kind_ptr + request) == 2
    tl.store(num_emitted_ptr + request, count)
    tl.store(num_rejected_ptr + request, tl.where(is_canvas, rows - count, 0))


def canvas_advance(
    table: CanvasTable,
    batch: ScheduledBatch,
    rows: CanvasRows,
    token: Tensor,
    probability: Tensor,
    num_filled: Tensor,
    *,
    mask_token_id: int,
    max_model_len: int,
    check_values: bool | None = None,
) -> Emission:
    """Bring every request of `batch` to its next forward, after `canvas_update`.

    Args:
        table: state of all slots; tokens, causal and step of the batch's slots are written.
        batch, rows: of this forward.
        token: [B, R] int32: the next token of rows that read text, never the mask; of rows to
            fill, where `num_filled` is 0, the best token but the mask.
        probability: [B, R] fp32 of those; read where `num_filled` is 0.
        num_filled: [B] int32, columns that the step filled.
        mask_token_id, max_model_len, check_values: as for `canvas_rows`.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong.
    """
    device, (count, num_rows) = table.tokens.device, rows.needed.shape
    length = table.tokens.shape[1]
    table.check_layout(device)
    batch.check(table, values_are_checked(check_values, device))
    require_tensor("needed", rows.needed, (len(batch.slot), None), (torch.int32,), device)
    require_tensor("token", token, (count, num_rows), (torch.int32,), device)
    require_tensor("probability", probability, (count, num_rows), (torch.float32,), device)
    require_tensor("num_filled", num_filled, (count,), (torch.int32,), device)
    emission = Emission(
        torch.zeros(count, length, dtype=torch.int64, device=device),
        torch.empty(count, dtype=torch.int32, device=device),
        torch.empty(count, dtype=torch.int32, device=device),
    )
    if count == 0:
        return emission
    _canvas_advance_kernel[(count,)](
        *emission,
        *table,
        *batch,
        rows.mode,
        rows.needed,
        num_filled,
        token.contiguous(),
        probability.contiguous(),
        mask_token_id,
        max_model_len,
        length,
        num_rows,
        table.tokens.stride(0),
        BLOCK_L=triton.next_power_of_2(length),
    )
    return emission


def canvas_advance_reference(
    table: CanvasTable,
    batch: ScheduledBatch,
    rows: CanvasRows,
    token: Tensor,
    probability: Tensor,
    num_filled: Tensor,
    *,
    mask_token_id: int,
    max_model_len: int,
) -> Emission:
    """Plain Python `canvas_advance`, one request at a time."""
    count, length = len(batch.slot), table.tokens.shape[1]
    emission = Emission(
        torch.zeros(count, length, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int32),
        torch.zeros(count, dtype=torch.int32),
    )
    for b, slot in enumerate(batch.slot.tolist()):
        scheduled = int(batch.query_start[b + 1] - batch.query_start[b])
        end = int(batch.seq_len[b])
        start, canvas, emitted = end - scheduled, table.tokens[slot], 0
        width = canvas_width_reference(table, slot, start, max_model_len)
        masks = [i for i in range(width) if canvas[i] == mask_token_id]
        verified = bool(table.verifies[slot])
        if rows.mode[b] == Mode.FILL:
            if num_filled[b] == 0:
                needed = [r for r, flag in enumerate(rows.needed[b].tolist()) if flag]
                best = max(needed, key=lambda r: (float(probability[b, r]), -r))
                canvas[masks[0] + best] = token[b, best]
                masks = [i for i in masks if i != masks[0] + best]
            table.step[slot] += 1
            drafted = verified and table.step[slot] >= table.max_steps[slot]
            table.causal[slot] = int(not masks or drafted)
        elif rows.mode[b] in (Mode.TEXT, Mode.BEGIN):
            seed = int(token[b, 0])
            if rows.mode[b] == Mode.TEXT:
                text = canvas[: masks[0] if masks else width].tolist()
                emitted = len(text)
                if verified:
                    found = token[b, : len(text)].tolist()
                    right = [a == e for a, e in zip(found, text[1:], strict=False)]
                    emitted = right.index(False) + 1 if False in right else len(text)
                    seed = found[emitted - 1]
                emission.tokens[b, :emitted] = torch.tensor(text[:emitted])
                end = start + emitted
            width = canvas_width_reference(table, slot, end, max_model_len)
            canvas[:] = PAD.value
            canvas[:width] = mask_token_id
            if width:
                canvas[0] = seed
            table.step[slot] = 0
            table.causal[slot] = int(width <= 1)
        emission.num_emitted[b] = emitted
        is_canvas = int(batch.kind[b]) == 2
        emission.num_rejected[b] = scheduled - emitted if is_canvas else 0
    return emission
