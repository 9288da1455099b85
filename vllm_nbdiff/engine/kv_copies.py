# SPDX-License-Identifier: Apache-2.0
"""KV that is copied to pages of canvases that have some of their own.

The first of these begins with what lies before the canvas on its page: text of earlier forwards,
which is copied by pages, and where a text is verified rows of the same forward, whose KV every
layer writes to more slots than their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_nbdiff.decoding.indices import indices
from vllm_nbdiff.decoding.plan import Plan


def copied_pages(plan: Plan, table: Tensor, page_size: int, static: bool) -> tuple[Tensor, Tensor]:
    """Pages [n] int64 that hold text before canvases, and those that it is copied to.

    Args:
        table: [B, pages] int64, pages of each request.
        static: n does not depend on values; vLLM's null page is copied onto itself.
    """
    canvases = plan.canvases
    fresh = (canvases.moved > 0) & canvases.exists
    # Versions of a canvas stay where they are; beside a text all are new.
    level = indices(canvases.moved.shape[1], fresh.device)
    fresh &= (level > plan.state.copied[:, None]) | (plan.text > 0)[:, None]
    begin = canvases.start // page_size * page_size
    fresh &= (begin < canvases.start) & (begin < plan.state.start[:, None])
    first, last = canvases.start // page_size, table.shape[1] - 1
    source = table.gather(1, first.clamp(max=last))
    target = table.gather(1, (first + canvases.moved).clamp(max=last))
    if static:
        pages = (torch.where(fresh, pages, 0).flatten() for pages in (source, target))
        return next(pages), next(pages)
    return source[fresh], target[fresh]


def copied_rows(
    plan: Plan, table: Tensor, page_size: int, begin: Tensor, static: bool
) -> tuple[Tensor, Tensor]:
    """Rows [n] int64 of texts whose KV is copied, and the slots to which.

    Args:
        table: [B, pages] int64, pages of each request.
        begin: [B] int64, first row of each request.
        static: n does not depend on values; of what is not copied the slot is -1.
    """
    canvases = plan.canvases
    column = indices(canvases.tokens.shape[2], begin.device)
    place = (plan.state.start[:, None] + column)[:, None]  # [B, 1, L]
    page, start = place // page_size, canvases.start[..., None]
    wanted = (page == start // page_size) & (place < start) & (plan.text > 0)[:, None, None]
    wanted &= (canvases.exists & (canvases.moved > 0))[..., None]
    page = (page + canvases.moved[..., None]).clamp(max=table.shape[1] - 1)
    slot = table.gather(1, page.flatten(1)).view(page.shape) * page_size + place % page_size
    row = (begin[:, None] + column)[:, None].expand(slot.shape)
    if static:
        return torch.where(wanted, row, 0).flatten(), torch.where(
            wanted, slot, PAD_SLOT_ID
        ).flatten()
    return row[wanted], slot[wanted]


class KVCopies:
    """The copies of the coming forward."""

    def __init__(self) -> None:
        self.given: tuple[Tensor, Tensor] | None = None
        """Rows [n] int64 whose KV is written to slots [n] int64 as well, or to none: -1. None:
        nothing is copied."""

    def set(self, rows: Tensor, slots: Tensor) -> None:
        """Write KV of `rows` [n] int64 to `slots` [n] int64 as well."""
        self.given = (rows, slots) if len(rows) else None

    def clear(self) -> None:
        """Of this forward nothing is copied."""
        self.given = None

    def write(
        self, update: Callable[..., None], layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor
    ) -> None:
        """Have vLLM's `update` write what of key and value [T, kv_heads, head_size] is copied."""
        if self.given is not None:
            rows, slots = self.given
            update(layer, key[rows], value[rows], kv_cache, slots)
