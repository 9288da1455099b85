# SPDX-License-Identifier: Apache-2.0
"""Which rows of a forward need logits, and what each of them decides. One launch a forward,
nothing read back to the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .canvas_table import (
    CanvasTable,
    Kind,
    Mode,
    ScheduledBatch,
    canvas_width,
    canvas_width_reference,
)
from .validation import require, values_are_checked

_PROMPT_END = tl.constexpr(Kind.PROMPT_END.value)
_CANVAS = tl.constexpr(Kind.CANVAS.value)
_BEGIN = tl.constexpr(Mode.BEGIN.value)
_FILL = tl.constexpr(Mode.FILL.value)
_TEXT = tl.constexpr(Mode.TEXT.value)


class CanvasRows(NamedTuple):
    """R rows of logits for each of B requests, needed or not: their number is the host's choice.

    Of a canvas to fill, row r decides column `first masked column + r`; of a draft to verify, what
    follows column r; of a commit or a prompt's end, row 0 gives the next canvas's seed.
    """

    mode: Tensor
    """[B] int32 of `Mode`."""
    quota: Tensor
    """[B] int32: least number of columns to fill, at least 1."""
    row: Tensor
    """[B, R] int64: row of the forward; of rows not needed the request's first one."""
    needed: Tensor
    """[B, R] int32: `Mode` of the request where its row is needed, else 0."""
    position: Tensor
    """[B, R] int64: absolute position that the row predicts."""
    step: Tensor
    """[B, R] int32: denoise step of the prediction; 0 for text."""


@triton.jit(do_not_specialize=["mask_token_id", "max_model_len", "length", "num_rows"])
def _canvas_rows_kernel(  # type: ignore[no-untyped-def]
    mode_ptr,
    quota_ptr,
    row_ptr,
    needed_ptr,
    position_ptr,
    out_step_ptr,
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
    mask_token_id,
    max_model_len,
    length,
    num_rows,
    stride_tokens,
    BLOCK_L: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + request)
    kind = tl.load(kind_ptr + request)
    begin = tl.load(query_start_ptr + request)
    rows = tl.load(query_start_ptr + request + 1) - begin
    start = tl.load(seq_len_ptr + request) - rows
    verifies = tl.load(verifies_ptr + slot) != 0
    step = tl.load(step_ptr + slot)
    width = canvas_width(
        slot, start, max_model_len, block_length_ptr, verifies_ptr, last_position_ptr
    )

    i = tl.arange(0, BLOCK_L)
    token = tl.load(tokens_ptr + slot * stride_tokens + i, mask=i < length, other=0)
    masked = (i < tl.minimum(width, length)) & (token == mask_token_id)
    num_masked = tl.sum(masked.to(tl.int32), axis=0)
    first = tl.min(tl.where(masked, i, width), axis=0)
    steps_left = tl.maximum(tl.load(max_steps_ptr + slot) - step, 1)
    # (a + b - 1) / b would overflow where the number of steps is unlimited.
    quota = num_masked // steps_left + (num_masked % steps_left != 0).to(tl.int32)
    quota = tl.maximum(quota, 1)
    # The sub-block that holds the quota-th mask ends what may be filled.
    count = tl.cumsum(masked.to(tl.int32), axis=0)
    last = tl.sum(((count < tl.minimum(quota, num_masked)) & (i < length)).to(tl.int32), axis=0)
    sub_block_length = tl.load(sub_block_length_ptr + slot)
    end = (last // sub_block_length + 1) * sub_block_length

    fits = (kind == _CANVAS) & (width >= 1) & (rows >= width)
    text = fits & (tl.load(causal_ptr + slot) != 0)
    mode = tl.where(text, _TEXT, tl.where(fits, _FILL, 0))
    mode = tl.where(kind == _PROMPT_END, _BEGIN, mode)
    tl.store(mode_ptr + request, mode)
    tl.store(quota_ptr + request, quota)

    # Row r of the request decides `column`, or what follows it where text is read.
    r = tl.arange(0, BLOCK_L)
    column = first + r
    fill = masked & (i < end)
    # fill[column] without a gather: candidates moved to the front.
    moved = tl.sum(
        (fill[None, :] & (i[None, :] == column[:, None])).to(tl.int32),
        axis=1,
    )
    needed = tl.where(moved != 0, _FILL, 0)
    row = column - 1
    is_text = mode == _TEXT
    commit_row = tl.where(mode == _BEGIN, rows - 1, width - 1)
    text_row = tl.where(is_text & verifies, r, commit_row)
    text_needed = tl.where(is_text & verifies, r < first, r == 0)
    row = tl.where(mode == _FILL, row, text_row)
    needed = tl.where(mode == _FILL, needed, tl.where(text_needed, mode, 0))
    needed = tl.where(mode == 0, 0, needed)
    row = tl.where(needed != 0, row, 0)

    valid = r < num_rows
    out = request * num_rows + r
    # A drafted token shares its random number with the verification, which confirms it more often.
    drawn_step = tl.where((needed == _FILL) & (verifies == 0), step, 0)
    tl.store(row_ptr + out, (begin + row).to(tl.int64), mask=valid)
    tl.store(needed_ptr + out, needed, mask=valid)
    tl.store(position_ptr + out, (start + row + 1).to(tl.int64), mask=valid)
    tl.store(out_step_ptr + out, drawn_step, mask=valid)


def canvas_rows(
    table: CanvasTable,
    batch: ScheduledBatch,
    *,
    num_rows: int,
    mask_token_id: int,
    max_model_len: int,
    check_values: bool | None = None,
) -> CanvasRows:
    """The rows that need logits in the forward that `batch` is scheduled for.

    Args:
        table: state of all slots; not changed.
        batch: B requests.
        num_rows: rows for every request, 1 to L: as many as the canvas columns that one of them
            may fill in a step, or verify.
        mask_token_id: id that marks a column as masked.
        max_model_len: positions a request may have.
        check_values: read slot and kind back and check them (a device synchronisation); None
            checks on CPU only.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong.
    """
    device, count = table.tokens.device, len(batch.slot)
    length = table.tokens.shape[1]
    table.check_layout(device)
    batch.check(table, values_are_checked(check_values, device))
    require(1 <= num_rows <= length, "num_rows", f"{num_rows} outside [1, {length}]")
    shapes = [(count,)] * 2 + [(count, num_rows)] * 4
    dtypes = [torch.int32, torch.int32, torch.int64, torch.int32, torch.int64, torch.int32]
    result = CanvasRows(
        *(torch.empty(s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True))
    )
    if count == 0:
        return result
    _canvas_rows_kernel[(count,)](
        *result,
        *table,
        *batch,
        mask_token_id,
        max_model_len,
        length,
        num_rows,
        table.tokens.stride(0),
        BLOCK_L=triton.next_power_of_2(length),
    )
    return result


def canvas_rows_reference(
    table: CanvasTable,
    batch: ScheduledBatch,
    *,
    num_rows: int,
    mask_token_id: int,
    max_model_len: int,
) -> CanvasRows:
    """Plain Python `canvas_rows`, one request at a time."""
    count = len(batch.slot)
    result = CanvasRows(
        torch.zeros(count, dtype=torch.int32),
        torch.ones(count, dtype=torch.int32),
        torch.zeros(count, num_rows, dtype=torch.int64),
        torch.zeros(count, num_rows, dtype=torch.int32),
        torch.zeros(count, num_rows, dtype=torch.int64),
        torch.zeros(count, num_rows, dtype=torch.int32),
    )
    for b, slot in enumerate(batch.slot.tolist()):
        begin, stop = batch.query_start[b : b + 2].tolist()
        start = int(batch.seq_len[b]) - (stop - begin)
        result.row[b], result.position[b] = begin, start + 1
        width = canvas_width_reference(table, slot, start, max_model_len)
        canvas = table.tokens[slot, :width].tolist()
        masks = [i for i, token in enumerate(canvas) if token == mask_token_id]
        first = masks[0] if masks else width
        steps_left = max(int(table.max_steps[slot]) - int(table.step[slot]), 1)
        quota = max(-(-len(masks) // steps_left), 1)
        result.quota[b] = quota
        rows: list[tuple[int, int]] = []  # of each needed row: its r, its row in the request
        if batch.kind[b] == Kind.PROMPT_END:
            mode, rows = Mode.BEGIN, [(0, stop - begin - 1)]
        elif batch.kind[b] == Kind.PROMPT or not 1 <= width <= stop - begin:
            mode = Mode.NOTHING
        elif table.causal[slot]:
            mode = Mode.TEXT
            verified = bool(table.verifies[slot])
            rows = [(i, i) for i in range(first)] if verified else [(0, width - 1)]
        else:
            mode = Mode.FILL
            size = int(table.sub_block_length[slot])
            end = (masks[min(quota, len(masks)) - 1] // size + 1) * size if masks else 0
            rows = [(i - first, i - 1) for i in masks if i < end]
            if not table.verifies[slot]:
                for r, _ in rows:
                    if r < num_rows:
                        result.step[b, r] = table.step[slot]
        result.mode[b] = mode
        for r, row in rows:
            if r < num_rows:
                result.needed[b, r] = mode
                result.row[b, r] = begin + row
                result.position[b, r] = start + row + 1
    return result
