# SPDX-License-Identifier: Apache-2.0
"""Segments: runs of query rows of one request with one KV length and one causal flag.

A forward writes the KV of all its rows first, then every segment attends to the KV of its own
request, so a request may own several segments: a block that is committed and the canvas of the
next one, for example.

A canvas is also computed in versions that must not see each other. Version n has pages of its own:
where the canvas touches p pages, the n-th p pages behind them, which hold no text yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.utils import AttentionGroup, copy_kv_cache_blocks_inplace


@dataclass
class Segments:
    """S segments in the order of their rows, R rows in all."""

    owner: np.ndarray  # [S] int64, batch index of the request
    first: np.ndarray  # [S] int64, absolute position of the first row
    length: np.ndarray  # [S] int64, rows, at least 1
    kv_length: np.ndarray  # [S] int64, tokens whose KV is seen
    causal: np.ndarray  # [S] bool, else every row sees all `kv_length` tokens
    version: np.ndarray  # [S] int64, whose pages hold the rows; 0: where text belongs

    def positions(self) -> np.ndarray:
        """Absolute position of every row, [R] int64."""
        ends = self.length.cumsum()
        shift = np.repeat(self.first - ends + self.length, self.length)
        return np.arange(int(ends[-1])) + shift

    def pages(self, page_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The first page of the request that a version replaces, and how many, [S] int64 each."""
        first = self.first // page_size
        return first, -(-self.kv_length // page_size) - first

    def same_shape(self, other: Segments) -> bool:
        """Whether attention metadata of `other` serves these segments."""
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("owner", "length", "kv_length", "causal", "version")
        )


@dataclass
class PagedBatch:
    """Where the KV of the scheduled requests lies: what all forwards of one schedule share."""

    attn_groups: list[list[AttentionGroup]]
    block_tables: tuple[torch.Tensor, ...]
    kv_cache_config: KVCacheConfig
    vllm_config: VllmConfig
    device: torch.device

    def __post_init__(self) -> None:
        groups = self.kv_cache_config.kv_cache_groups
        assert len(groups) == 1, "models of one KV cache group only"
        self.page_size = groups[0].kv_cache_spec.block_size
        self._tables = self.block_tables[0].cpu().numpy()
        layers = self.vllm_config.compilation_config.static_forward_context
        self._kv_caches = [layers[name].kv_cache for name in groups[0].layer_names]
        self._previous: SegmentForward | None = None

    def forward(self, segments: Segments, input_ids: np.ndarray) -> SegmentForward:
        """Inputs and attention metadata of a forward over `input_ids` [R] int."""
        positions = segments.positions()
        _, count = segments.pages(self.page_size)
        column = positions // self.page_size + np.repeat(segments.version * count, segments.length)
        pages = self._tables[np.repeat(segments.owner, segments.length), column]
        slots = pages.astype(np.int64) * self.page_size + positions % self.page_size
        slot_mapping = self._to_device(slots)
        previous = self._previous
        if previous is not None and segments.same_shape(previous.segments):
            metadata = previous.metadata
        else:
            metadata = self._metadata(segments, slot_mapping)
        self._previous = SegmentForward(
            segments=segments,
            input_ids=self._to_device(input_ids.astype(np.int32)),
            positions=self._to_device(positions),
            metadata=metadata,
            slot_mapping=build_slot_mappings_by_layer(slot_mapping[None], self.kv_cache_config),
            vllm_config=self.vllm_config,
        )
        return self._previous

    def copy_text(self, segments: Segments, chosen: np.ndarray) -> None:
        """Give the `chosen` [S] bool versions the text before their first row on its page."""
        chosen = chosen & (segments.first % self.page_size > 0)
        if not chosen.any():
            return
        first, count = (pages[chosen] for pages in segments.pages(self.page_size))
        owner, version = segments.owner[chosen], segments.version[chosen]
        source = self._tables[owner, first].tolist()
        target = self._tables[owner, first + version * count].tolist()
        copies = [KVCacheBlockCopy(*pair) for pair in zip(source, target, strict=True)]
        copy_kv_cache_blocks_inplace(self._kv_caches, self._kv_caches[0].shape[0], copies)

    def _segment_tables(self, segments: Segments) -> torch.Tensor:
        """Page-table row of every segment, [S, pages] int32."""
        table = self.block_tables[0][self._to_device(segments.owner)]
        if segments.version.any():
            first, count = segments.pages(self.page_size)
            count = np.where(segments.version > 0, count, 0)
            row = np.repeat(np.arange(len(count)), count)
            column = np.arange(len(row)) + np.repeat(first - count.cumsum() + count, count)
            page = self._tables[segments.owner[row], column + (segments.version * count)[row]]
            table[self._to_device(row), self._to_device(column)] = self._to_device(page)
        return table

    def _metadata(self, segments: Segments, slot_mapping: torch.Tensor) -> dict[str, Any]:
        starts = np.zeros(len(segments.length) + 1, dtype=np.int32)
        segments.length.cumsum(out=starts[1:])
        seq_lens = torch.from_numpy(segments.kv_length.astype(np.int32))
        return build_attn_metadata(
            attn_groups=self.attn_groups,
            num_reqs=len(segments.length),
            num_tokens=int(starts[-1]),
            query_start_loc_gpu=self._to_device(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            max_query_len=int(segments.length.max()),
            seq_lens=seq_lens.to(self.device),
            max_seq_len=int(segments.kv_length.max()),
            block_tables=(self._segment_tables(segments),),
            slot_mappings=slot_mapping[None],
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens,
            is_prefilling=torch.zeros(len(segments.length), dtype=torch.bool),
            causal=self._to_device(segments.causal.astype(np.int32)),
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


@dataclass
class SegmentForward:
    """One forward over segments, in place of the rows that the runner prepared."""

    segments: Segments
    input_ids: torch.Tensor  # [R] int32
    positions: torch.Tensor  # [R] int64
    metadata: dict[str, Any]
    slot_mapping: dict[str, torch.Tensor]
    vllm_config: VllmConfig

    @contextmanager
    def context(self) -> Iterator[None]:
        """vLLM's forward context for these rows."""
        with set_forward_context(
            self.metadata,
            self.vllm_config,
            num_tokens=len(self.input_ids),
            slot_mapping=self.slot_mapping,
        ):
            yield
