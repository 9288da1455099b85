# SPDX-License-Identifier: Apache-2.0
"""Segments: which query rows see which keys of a paged KV cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from .validation import require, require_tensor


class SegmentTable(NamedTuple):
    """Runs of query rows, each with one KV length and one causal flag, over paged KV.

    A request may own several segments (a commit and the next canvas, the blocks of a block-causal
    prefill). With n = query_start[s + 1] - query_start[s] rows, row i of segment s sees the first
    `kv_len[s]` keys, or the first `kv_len[s] - n + i + 1` where `causal[s]` is 1. Segments of zero
    rows are allowed: they pad a table to the fixed shape of a CUDA graph.
    """

    query_start: Tensor
    """[segments + 1] int32: first query row of each segment, then the number of rows in use."""
    kv_len: Tensor
    """[segments] int32: keys visible to the segment, in tokens."""
    causal: Tensor
    """[segments] int32: 1 causal, 0 bidirectional."""
    page_table: Tensor
    """[segments, max_pages] int32: page of each `page_size` keys of the segment's request."""

    @property
    def num_segments(self) -> int:
        return self.kv_len.shape[0]

    def check_layout(self, device: torch.device) -> None:
        """Raise ValueError naming the field with a wrong shape, dtype, device or stride."""
        count = self.kv_len.numel()
        int32 = (torch.int32,)
        require_tensor("kv_len", self.kv_len, (None,), int32, device)
        require_tensor("query_start", self.query_start, (count + 1,), int32, device)
        require_tensor("causal", self.causal, (count,), int32, device)
        require_tensor("page_table", self.page_table, (count, None), int32, device)

    def check_values(self, num_tokens: int, num_pages: int, page_size: int) -> None:
        """Raise ValueError naming the field with an impossible value. Synchronises with the device.

        Args:
            num_tokens: query rows at hand, at least `query_start[-1]`.
            num_pages: pages in the KV cache; page ids in use lie in [0, num_pages).
            page_size: tokens per page.
        """
        starts, kv_len, causal = self.query_start.cpu(), self.kv_len.cpu(), self.causal.cpu()
        rows = starts.diff()
        require(int(starts[0]) == 0, "query_start", "must start at 0")
        require(bool((rows >= 0).all()), "query_start", "must not decrease")
        require(int(starts[-1]) <= num_tokens, "query_start", f"ends past {num_tokens} query rows")
        require(bool(((causal == 0) | (causal == 1)).all()), "causal", "must be 0 or 1")

        capacity = self.page_table.shape[1] * page_size
        fewest = torch.where(causal == 1, rows, rows.clamp(max=1))
        require(bool((kv_len >= fewest).all()), "kv_len", "leaves a query row without a key")
        require(bool((kv_len <= capacity).all()), "kv_len", f"exceeds a page_table of {capacity}")

        pages = torch.arange(self.page_table.shape[1])
        used = (pages < (kv_len[:, None] + page_size - 1) // page_size) & (rows[:, None] > 0)
        ids = self.page_table.cpu()[used]
        valid = bool(((ids >= 0) & (ids < num_pages)).all())
        require(valid, "page_table", f"page id outside [0, {num_pages})")
