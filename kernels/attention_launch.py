# SPDX-License-Identifier: Apache-2.0
"""How attention of a forward's segments is launched: the same for all of its layers."""

from typing import NamedTuple

import triton
from torch import Tensor

from .attention_tile import tile_shape
from .device import device_name, multiprocessor_count, shared_memory
from .kv_parts import KVParts, cut_keys, limits_of
from .segment_table import SegmentTable
from .tuned_tiles import NOT_TUNED, TileShape, tuned_tiles


class AttentionLaunch(NamedTuple):
    """Of `segment_attention`, for all layers of a forward."""

    tile: TileShape
    parts: KVParts | None
    """Into which the keys are cut; None: keys are whole."""


def attention_launch(
    q: Tensor,
    k_cache: Tensor,
    segments: SegmentTable,
    *,
    max_query_len: int | None = None,
    max_kv_len: int | None = None,
    tile: TileShape | None = None,
) -> AttentionLaunch:
    """The launch of `segment_attention` with these tensors, of which no values are read back.

    Args:
        q: [num_tokens, num_q_heads, head_dim].
        k_cache: [num_pages, page_size, num_kv_heads, head_dim].
        segments: the segment table.
        max_query_len: upper bound of rows per segment (default num_tokens); picks the tile.
        max_kv_len: upper bound of kv_len in tokens (default the page table's capacity).
        tile: another than that.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    if tile is None:
        # What was measured holds for a cache of q's type: others take other room.
        tuned = tuned_tiles(device_name(q.device)) if k_cache.dtype == q.dtype else NOT_TUNED
        rows, memory = max_query_len or num_tokens, shared_memory(q.device)
        tile = tile_shape(head_dim, group, rows, q.element_size(), memory, tuned)
    processors = multiprocessor_count(q.device)
    limits = limits_of(tile, group, num_kv_heads, processors, k_cache.element_size())
    most = max_kv_len or segments.page_table.shape[1] * page_size
    # Half of fewer tiles and what a part costs are no less than the whole.
    worth = triton.cdiv(most, tile.block_n) > 2 * limits.part_cost
    return AttentionLaunch(tile, cut_keys(segments, limits) if worth else None)
