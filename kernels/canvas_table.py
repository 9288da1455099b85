# SPDX-License-Identifier: Apache-2.0
"""Decoding state of all requests on the device, and what a forward does with a request."""

from enum import IntEnum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .validation import require, require_tensor


class Kind(IntEnum):
    """What is scheduled of a request; known to the host."""

    PROMPT = 0
    """Prompt tokens, more of them to come."""
    PROMPT_END = 1
    """Prompt tokens up to the last one."""
    CANVAS = 2
    """The columns of its canvas."""


class Mode(IntEnum):
    """What a forward does with a request; follows from its kind and its canvas."""

    NOTHING = 0
    """Only KV is written; or a canvas was scheduled that does not fit, and nothing counts."""
    BEGIN = 1
    """The prompt's last row gives the seed of the first canvas."""
    FILL = 2
    """A denoise step."""
    TEXT = 3
    """A canvas is read causally: committed, or its drafted tokens verified."""


class CanvasTable(NamedTuple):
    """Request slots, canvases of L columns: state that the kernels change, then options.

    Columns past a request's canvas width hold no mask. Widths follow from `block_length`, cut at
    the model's length and, where text is verified, at `last_position`.
    """

    tokens: Tensor
    """[slots, L] int64."""
    causal: Tensor
    """[slots] int32: 1 when the next forward reads text: a prompt, a canvas to commit or verify."""
    step: Tensor
    """[slots] int32, denoise steps done on the canvas."""
    block_length: Tensor
    """[slots] int32."""
    sub_block_length: Tensor
    """[slots] int32."""
    max_steps: Tensor
    """[slots] int32: denoise steps until a canvas is full or, where verified, is verified."""
    verifies: Tensor
    """[slots] int32: 1 where drafts are verified, so that text is what AR decoding gives."""
    last_position: Tensor
    """[slots] int32: of the last token wanted."""

    def check_layout(self, device: torch.device) -> None:
        """Raise ValueError naming the field with a wrong shape, dtype, device or stride."""
        require_tensor("tokens", self.tokens, (None, None), (torch.int64,), device)
        for name, column in zip(self._fields[1:], self[1:], strict=True):
            require_tensor(name, column, (len(self.tokens),), (torch.int32,), device)


class ScheduledBatch(NamedTuple):
    """The scheduled requests, B of them, as the runner laid out their rows."""

    slot: Tensor
    """[B] int64, row of the canvas table."""
    kind: Tensor
    """[B] int32 of `Kind`."""
    query_start: Tensor
    """[B + 1] int32 or longer: first row of each request, then the number of rows."""
    seq_len: Tensor
    """[B] int32 or longer: tokens of a request with its scheduled rows."""

    def check(self, table: CanvasTable, check_values: bool) -> None:
        """Raise ValueError naming the field with a wrong shape, dtype, device or value."""
        device, count = table.tokens.device, len(self.slot)
        require_tensor("slot", self.slot, (count,), (torch.int64,), device)
        require_tensor("kind", self.kind, (count,), (torch.int32,), device)
        require_tensor("query_start", self.query_start, (None,), (torch.int32,), device)
        require(len(self.query_start) > count, "query_start", f"shorter than {count + 1}")
        require_tensor("seq_len", self.seq_len, (None,), (torch.int32,), device)
        require(len(self.seq_len) >= count, "seq_len", f"shorter than {count}")
        if check_values:
            inside = bool(((self.slot >= 0) & (self.slot < len(table.tokens))).all())
            require(inside, "slot", f"outside [0, {len(table.tokens)})")
            known = bool(((self.kind >= 0) & (self.kind <= Kind.CANVAS)).all())
            require(known, "kind", "not a Kind")


@triton.jit
def canvas_width(  # type: ignore[no-untyped-def]
    slot, start, max_model_len, block_length_ptr, verifies_ptr, last_position_ptr
):
    """Columns of the canvas of `slot` that begins at position `start`; 0 where there is no room."""
    width = tl.minimum(tl.load(block_length_ptr + slot), max_model_len - start)
    wanted = tl.load(last_position_ptr + slot) - start + 1
    width = tl.where(tl.load(verifies_ptr + slot) != 0, tl.minimum(width, wanted), width)
    return tl.maximum(width, 0)


def canvas_width_reference(table: CanvasTable, slot: int, start: int, max_model_len: int) -> int:
    """Plain Python `canvas_width`."""
    width = min(int(table.block_length[slot]), max_model_len - start)
    if table.verifies[slot]:
        width = min(width, int(table.last_position[slot]) - start + 1)
    return max(width, 0)
