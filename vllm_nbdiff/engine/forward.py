# SPDX-License-Identifier: Apache-2.0
"""Segments on vLLM's paged KV cache: rows, KV slots and attention metadata of a forward.

A forward writes the KV of all its rows first, then every segment attends to the KV of its own
request, so a request may own several segments: a block that is committed and the canvas of the
next one, for example.

Canvases of a request that must not see each other, versions of one or those of several break
points, have pages of their own behind those of the text, which hold no text yet. What lies on the
first of them before the canvas is copied there (kv_copies.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.utils import AttentionGroup

from vllm_nbdiff.decoding.indices import indices
from vllm_nbdiff.decoding.plan import Batch, Facts, Plan
from vllm_nbdiff.decoding.rows import TokenRows, token_rows
from vllm_nbdiff.decoding.segments import Segments
from vllm_nbdiff.engine.graph_segments import GraphBuffers, SegmentArrays
from vllm_nbdiff.engine.kv_copies import KVCopies, copied_pages, copied_rows


@dataclass
class Forward:
    """One forward over rows of our own, in place of those that the runner prepared."""

    segments: Segments
    rows: TokenRows
    input_ids: Tensor  # [T] int32
    metadata: dict[str, Any]
    slot_mapping: dict[str, Tensor]
    vllm_config: VllmConfig
    order: Tensor | None = None
    """[n] int64, rows in which hidden states are given back; None: all, as they are."""

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


@dataclass
class PagedBatch:
    """Where the KV of the scheduled requests lies: what all forwards of one schedule share."""

    input_batch: InputBatch
    attn_groups: list[list[AttentionGroup]]
    block_tables: tuple[Tensor, ...]
    slot_mappings: Tensor
    kv_cache_config: KVCacheConfig
    vllm_config: VllmConfig
    copies: KVCopies  # rows whose KV is written to other slots too
    graph: GraphBuffers | None  # what a full graph reads, whose padding takes part; None: no graph

    def __post_init__(self) -> None:
        groups = self.kv_cache_config.kv_cache_groups
        assert len(groups) == 1, "models of one KV cache group only"
        self.page_size = groups[0].kv_cache_spec.block_size
        layers = self.vllm_config.compilation_config.static_forward_context
        self._kv_caches = [layers[name].kv_cache for name in groups[0].layer_names]
        self._previous: Forward | None = None

    @property
    def most_segments(self) -> int | None:
        """Segments that each request may have; None: any number."""
        if self.graph is None:
            return None
        return self._room() // self.input_batch.num_reqs if self.graph.several else 1

    def _room(self) -> int:
        """Segments of the captured graph."""
        assert self.graph is not None
        runner = self.input_batch
        return self.graph.room(runner.num_tokens_after_padding, runner.num_reqs_after_padding)

    def forward(self, plan: Plan, batch: Batch, facts: Facts) -> Forward | None:
        """A forward over as many rows as the plan has; None without any."""
        segments, previous = plan.segments, self._previous
        self.copies.clear()
        if previous is not None and not facts.prefills and _same_rows(segments, previous.segments):
            rows, metadata = previous.rows, previous.metadata
            slot_mapping = previous.slot_mapping
        else:
            rows = token_rows(segments, None)
            if not len(rows.owner):
                return None
            slots = self._slots(segments, rows)[None]
            slot_mapping = build_slot_mappings_by_layer(slots, self.kv_cache_config)
            metadata = self._own_metadata(segments, slots, facts)
        ids = rows.tokens(segments, self._prompt_ids(rows, facts), batch.decodes)
        self._copy(plan, facts, rows.begin)
        self._previous = Forward(
            segments, rows, ids.int(), metadata, slot_mapping, self.vllm_config
        )
        return self._previous

    def in_place(self, plan: Plan, batch: Batch, facts: Facts, most: int) -> dict[str, Any]:
        """Attention metadata of a forward in the runner's own buffers, which are written here.

        Every request has the rows that were scheduled for it, whatever the plan has; `most` bounds
        the KV lengths.
        """
        runner, segments = self.input_batch, plan.segments
        total, count, starts = runner.num_tokens, len(batch.slot), runner.query_start_loc
        rows = token_rows(segments, (starts, total))
        runner.input_ids[:total] = rows.tokens(
            segments, self._prompt_ids(rows, facts), batch.decodes
        )
        assert rows.valid is not None
        # Padding may lie behind the last position that a model knows.
        runner.positions[:total] = torch.where(rows.valid, rows.position, 0)
        self.slot_mappings[0, :total] = torch.where(
            rows.valid, self._slots(segments, rows), PAD_SLOT_ID
        )
        self._copy(plan, facts, rows.begin)
        begins = segments.length.cumsum(1) - segments.length + starts[:count, None]
        begins = torch.cat([begins.flatten(), starts[count : count + 1]]).int()
        # Padding follows a request's rows, and must not shift what causal ones see.
        last = segments.first.flatten() + begins.diff()
        kv_length = torch.where(segments.causal.flatten(), last, segments.kv_length.flatten())
        tables = self._segment_tables(segments, facts).flatten(0, 1)
        arrays = SegmentArrays(begins, kv_length.int(), segments.causal.flatten().int(), tables)
        if self.graph is None:
            return self._metadata(
                arrays, self.slot_mappings, self._most_rows(segments, facts), most
            )
        self.graph.write(arrays)
        return self.of_graph(most)

    def _most_rows(self, segments: Segments, facts: Facts) -> int:
        """Bound of a segment's rows, the padding behind the last one of a request included."""
        most = int(self.input_batch.num_scheduled_tokens.max())
        # Blocks of a prompt, behind which padding is less than a block; canvases, two at most.
        return min(most, 2 * segments.tokens.shape[2]) if facts.blocks > 1 else most

    def of_runner(self, most: int) -> dict[str, Any]:
        """Attention metadata of a causal segment a request, in the runner's buffers.

        Args:
            most: bound of the KV lengths.
        """
        runner = self.input_batch
        padded = len(runner.seq_lens)
        longest = runner.max_query_len or int(runner.num_scheduled_tokens.max())
        arrays = SegmentArrays(
            runner.query_start_loc,
            runner.seq_lens,
            torch.ones_like(runner.seq_lens),
            self.block_tables[0][:padded],
        )
        return self._metadata(arrays, self.slot_mappings, longest, most)

    def of_graph(self, most: int) -> dict[str, Any]:
        """Attention metadata of a captured graph, of which a replay reads what is at its addresses.

        Args:
            most: bound of the KV lengths.
        """
        assert self.graph is not None
        runner = self.input_batch
        self.copies.set(*self.graph.copies(self._room()))
        longest = min(runner.num_tokens_after_padding, self.graph.block_length)
        return self._metadata(self.graph.segments(self._room()), self.slot_mappings, longest, most)

    def heal(self, requests: Tensor) -> None:
        """Make finite what the pages of `requests` [n] int64 hold, whose next owner reads around
        in them: vLLM's attention on a CPU lets a NaN through that it should not see."""
        pages = self.block_tables[0][requests].unique().long()
        for cache in self._kv_caches:
            if cache.dtype.itemsize > 1:  # not fp8
                cache[pages] = cache[pages].nan_to_num(0, 0, 0)

    def _prompt_ids(self, rows: TokenRows, facts: Facts) -> Tensor | None:
        """[T] int64 tokens of prompts as the runner laid them out; None without prompts."""
        if not facts.prefills:
            return None
        runner = self.input_batch
        place = runner.query_start_loc[rows.owner] + rows.offset
        return runner.input_ids[place.clamp(max=len(runner.input_ids) - 1)].long()

    def _slots(self, segments: Segments, rows: TokenRows) -> Tensor:
        """KV slot of every row, [T] int64."""
        page = rows.position // self.page_size
        if segments.moved.shape[1] > 1:
            page = page + segments.moved.flatten()[rows.segment]
        table = self.block_tables[0]
        if rows.valid is not None:  # padding may lie anywhere
            page = page.clamp(max=table.shape[1] - 1)
        return table[rows.owner, page].long() * self.page_size + rows.position % self.page_size

    def _copy(self, plan: Plan, facts: Facts, begin: Tensor) -> None:
        """Give canvases that have pages of their own the text before them on the first of these;
        rows of a request are those from `begin` [B] on."""
        self.copies.clear()
        if self.graph is not None and not facts.fan_out:
            self.graph.clear_copies()
        if not (facts.versions or facts.fan_out):
            return
        table = self.block_tables[0][: len(begin)].long()
        source, target = copied_pages(plan, table, self.page_size, facts.static)
        if len(source):
            for cache in self._kv_caches:
                cache[target] = cache[source]
        if facts.fan_out:
            rows = copied_rows(plan, table, self.page_size, begin, facts.static)
            if self.graph is None:
                self.copies.set(*rows)
            else:
                self.graph.write_copies(*rows)

    def _segment_tables(self, segments: Segments, facts: Facts) -> Tensor:
        """Page-table row of every segment, [B, S, pages] int32."""
        table = self.block_tables[0][: len(segments.first), None]
        table = table.expand(-1, segments.first.shape[1], -1)
        if not (facts.versions or facts.fan_out):
            return table
        page = indices(table.shape[2], table.device)
        first = (segments.first // self.page_size)[..., None]
        shift = torch.where(page >= first, segments.moved[..., None], 0)
        return table.gather(2, (page + shift).clamp(max=table.shape[2] - 1))

    def _own_metadata(self, segments: Segments, slots: Tensor, facts: Facts) -> dict[str, Any]:
        """Attention metadata of the segments that have rows."""
        table = self._segment_tables(segments, facts)
        fields = (segments.kv_length, segments.causal, table)
        kv_length, causal, tables = (field.flatten(0, 1) for field in fields)
        lengths = segments.length.flatten().tolist()
        if 0 in lengths:
            used = segments.length.flatten() > 0
            kv_length, causal, tables = kv_length[used], causal[used], tables[used]
            lengths = [length for length in lengths if length]
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        arrays = SegmentArrays(starts, kv_length.int(), causal.int(), tables)
        return self._metadata(arrays, slots, max(lengths), max(kv_length.tolist()))

    def _metadata(
        self, arrays: SegmentArrays, slots: Tensor, longest: int, most: int
    ) -> dict[str, Any]:
        """vLLM's metadata of segments.

        Args:
            slots: [1, T] int64.
            longest: bound of their rows.
            most: bound of their KV lengths.
        """
        runner, (starts, kv_length, causal, tables) = self.input_batch, arrays
        on_host = starts.device.type == "cpu"
        num_tokens = runner.num_tokens if slots is self.slot_mappings else slots.shape[1]
        if self.graph is not None:
            num_tokens = runner.num_tokens_after_padding
        return build_attn_metadata(
            attn_groups=self.attn_groups,
            num_reqs=len(kv_length),
            num_tokens=num_tokens,
            query_start_loc_gpu=starts,
            query_start_loc_cpu=starts if on_host else torch.from_numpy(runner.query_start_loc_np),
            max_query_len=longest,
            seq_lens=kv_length,
            max_seq_len=most,
            block_tables=(tables,),
            slot_mappings=slots,
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=kv_length if on_host else runner.seq_lens_cpu_upper_bound,
            is_prefilling=torch.zeros(len(kv_length), dtype=torch.bool),
            causal=causal,
        )


def _same_rows(one: Segments, other: Segments) -> bool:
    """Whether rows and metadata of `other` serve `one`: they differ in tokens alone."""
    fields = zip(one[:5], other[:5], strict=True)
    return all(torch.equal(own, its) for own, its in fields)
