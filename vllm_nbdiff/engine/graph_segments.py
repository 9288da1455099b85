# SPDX-License-Identifier: Apache-2.0
"""Segments, and copies of KV, that captured graphs read: at the same addresses in every step.

A graph of T tokens and R requests has room for more segments than R, as a request may own several:
those that have rows stand first, the rest have none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

# Segments beside one a request: two for as many tokens as a block has, and these at least.
_FEWEST_MORE = 8


class SegmentArrays(NamedTuple):
    """What attention is told of S segments, int32 each."""

    starts: Tensor  # [S + 1], first row of each, then the number of rows
    kv_length: Tensor  # [S], tokens whose KV is seen
    causal: Tensor  # [S], 0: every row sees all of them
    tables: Tensor  # [S, pages]


class GraphBuffers:
    """The memory of the largest graph; smaller ones read its beginning."""

    def __init__(
        self,
        num_tokens: int,
        num_reqs: int,
        num_pages: int,
        block_length: int,
        device: torch.device,
        several: bool,
        copies_per_segment: int,
    ) -> None:
        """
        Args:
            num_tokens, num_reqs: of the largest graph.
            num_pages: of a page table.
            block_length: most rows of nearly every segment.
            device: of the model.
            several: requests may own several segments, which vLLM's own attention has no room for.
            copies_per_segment: rows whose KV is copied for one, at most.
        """
        self.block_length = block_length
        self.several = several
        self.copies_per_segment = copies_per_segment if several else 0
        most = self.room(num_tokens, num_reqs)
        # The last place takes what is left out.
        places = most + 2
        self._starts = torch.zeros(places, dtype=torch.int32, device=device)
        self._kv_length = torch.zeros_like(self._starts)
        self._causal = torch.zeros_like(self._starts)
        self._tables = torch.zeros((places, num_pages), dtype=torch.int32, device=device)
        copies = most * self.copies_per_segment + 1
        self._rows = torch.zeros(copies, dtype=torch.int64, device=device)
        self._slots = torch.full_like(self._rows, PAD_SLOT_ID)

    def room(self, num_tokens: int, num_reqs: int) -> int:
        """Segments of a graph of that size: every one costs programs of each attention launch."""
        if not self.several:
            return num_reqs
        return num_reqs + max(2 * num_tokens // self.block_length, _FEWEST_MORE)

    def clear(self) -> None:
        """No segment has rows, and nothing is copied."""
        self._starts.zero_()
        self.clear_copies()

    def clear_copies(self) -> None:
        """Nothing is copied."""
        self._rows.zero_()  # the next graph may have fewer
        self._slots.fill_(PAD_SLOT_ID)

    def segments(self, count: int) -> SegmentArrays:
        """What a graph of `count` segments reads."""
        starts, kv_length = self._starts[: count + 1], self._kv_length[:count]
        return SegmentArrays(starts, kv_length, self._causal[:count], self._tables[:count])

    def copies(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows whose KV a graph of `count` segments writes to other slots too, or to none: -1."""
        most = count * self.copies_per_segment
        return self._rows[:most], self._slots[:most]

    def write(self, segments: SegmentArrays) -> None:
        """Take those of any number of `segments` that have rows."""
        used = segments.starts.diff() > 0
        place = torch.where(used, used.cumsum(0) - 1, len(self._starts) - 1)
        self._starts.fill_(0)
        self._starts += segments.starts[-1]
        self._starts[place] = segments.starts[:-1]
        self._kv_length[place] = segments.kv_length
        self._causal[place] = segments.causal
        self._tables[place] = segments.tables

    def write_copies(self, rows: Tensor, slots: Tensor) -> None:
        """Take those of `rows` [n] int64 whose slot is not -1."""
        used = slots >= 0
        place = torch.where(used, used.cumsum(0) - 1, len(self._rows) - 1)
        self.clear_copies()
        self._rows[place], self._slots[place] = rows, slots
