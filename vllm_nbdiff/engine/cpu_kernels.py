# SPDX-License-Identifier: Apache-2.0
"""numpy stand-ins for the small Triton kernels of vLLM's model runner V2.

Each takes the arguments of the kernel of the same name, in its order, and has its effect; the
launch grid is not passed on, so sizes come from the tensors. A batch has at most a few hundred
requests here, so a Python loop over requests is cheaper than building index arrays.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch


@functools.lru_cache(maxsize=256)
def _table_at(address: int, rows: int, columns: int) -> np.ndarray:
    """The int32 table that lives at `address` (vLLM hands tables over as raw pointers)."""
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_int32))
    return np.ctypeslib.as_array(pointer, shape=(rows, columns))


def _apply_write(
    output: torch.Tensor,
    output_stride: int,
    write_indices: torch.Tensor,
    write_starts: torch.Tensor,
    write_contents: torch.Tensor,
    write_cu_lens: torch.Tensor,
    write_group_ids: torch.Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Scatter staged rows: output[index, start : start + n] = contents."""
    if MULTI_GROUP:
        raise NotImplementedError("models with several KV cache groups have no CPU kernels")
    out, contents = output.numpy(), write_contents.numpy()
    begin = 0
    for index, start, end in zip(
        write_indices.tolist(), write_starts.tolist(), write_cu_lens.tolist(), strict=True
    ):
        if out.ndim == 1:
            out[index + start : index + start + end - begin] = contents[begin:end]
        else:
            out[index, start : start + end - begin] = contents[begin:end]
        begin = end


def _gather_block_tables(
    idx_mapping: torch.Tensor,
    src_ptrs: torch.Tensor,
    dst_ptrs: torch.Tensor,
    strides: torch.Tensor,
    num_blocks: torch.Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    num_computed_tokens: torch.Tensor | None = None,
    sliding_window_reach: torch.Tensor | None = None,
    block_sizes: torch.Tensor | None = None,
    MASK_SLIDING_WINDOW: bool = False,
    BLOCK_SIZE: int = 0,
) -> None:
    """Copy the block table row of every request of the batch to its batch position.

    vLLM 0.33 also passes what it takes to hide the blocks before a sliding window.
    """
    if MASK_SLIDING_WINDOW:
        raise NotImplementedError("models with sliding windows have no CPU kernels")
    slots = idx_mapping.numpy()[:num_reqs]
    blocks = num_blocks.numpy()
    for group in range(strides.shape[0]):
        width = int(strides[group])
        src = _table_at(int(src_ptrs[group]), blocks.shape[1], width)
        dst = _table_at(int(dst_ptrs[group]), blocks.shape[1], width)
        used = int(blocks[group, slots].max())
        dst[:num_reqs, :used] = src[slots, :used]


def _compute_slot_mappings(
    max_num_tokens: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    table_ptrs: torch.Tensor,
    table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    slot_mapping_enabled: torch.Tensor,
    dcp_sharded: torch.Tensor,
    slot_mappings: torch.Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """The KV cache slot of every token of the batch; the rest of the buffer is padding."""
    num_reqs = idx_mapping.shape[0]
    slots = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: num_reqs + 1]
    num_tokens = int(starts[num_reqs])
    owner = np.repeat(slots, np.diff(starts))
    position = positions.numpy()[:num_tokens]
    out = slot_mappings.numpy()
    for group in range(table_strides.shape[0]):
        size = int(block_sizes[group])
        table = _table_at(int(table_ptrs[group]), int(slots.max()) + 1, int(table_strides[group]))
        pages = table[owner, position // size].astype(np.int64)
        out[group, :num_tokens] = pages * size + position % size
        out[group, num_tokens:max_num_tokens] = PAD_ID


def _prepare_prefill_inputs(
    input_ids: torch.Tensor,
    next_prefill_tokens: torch.Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    all_token_ids: torch.Tensor,
    all_token_ids_stride: int,
    prefill_lens: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Copy the scheduled prompt tokens of every prefilling request to the input buffer."""
    out, tokens = input_ids.numpy(), all_token_ids.numpy()
    starts, prefill = query_start_loc.numpy(), prefill_lens.numpy()
    computed = num_computed_tokens.numpy()
    for row, slot in enumerate(idx_mapping.tolist()):
        done = computed[slot]
        if done < prefill[slot]:
            begin, end = starts[row], starts[row + 1]
            out[begin:end] = tokens[slot, done : done + end - begin]


def _prepare_pos_seq_lens(
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Positions of every token and sequence length of every request of the batch."""
    num_reqs = idx_mapping.shape[0]
    starts = query_start_loc.numpy()[: num_reqs + 1]
    computed = num_computed_tokens.numpy()[idx_mapping.numpy()]
    lengths = np.diff(starts)
    out = seq_lens.numpy()
    out[:num_reqs] = computed + lengths
    out[num_reqs:max_num_reqs] = 0
    num_tokens = int(starts[num_reqs])
    shift = np.repeat(computed - starts[:num_reqs], lengths)
    positions.numpy()[:num_tokens] = np.arange(num_tokens) + shift


def _combine_sampled_and_draft_tokens(
    input_ids: torch.Tensor,
    idx_mapping: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    prefill_len: torch.Tensor,
    draft_tokens: torch.Tensor,
    draft_tokens_stride: int,
    cu_num_logits: torch.Tensor,
    logits_indices: torch.Tensor,
    BLOCK_SIZE: int = 0,
    NUM_NEW_SAMPLED_TOKENS: int = 0,
) -> None:
    """The rows of logits of every request, as many as it has draft tokens.

    The draft tokens themselves are canvases, which our forward puts into its rows.
    """
    assert NUM_NEW_SAMPLED_TOKENS == 0, "only the canvas path is served on CPU"
    rows, ends, bounds = logits_indices.numpy(), query_start_loc.numpy(), cu_num_logits.numpy()
    for row in range(len(idx_mapping)):
        begin, count = bounds[row], bounds[row + 1] - bounds[row]
        rows[begin : begin + count] = np.arange(ends[row + 1] - count, ends[row + 1])


def _expand_idx_mapping(
    idx_mapping: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    cu_num_logits: torch.Tensor,
    BLOCK_SIZE: int,
) -> None:
    """Repeat every request's slot once for each of its logits rows."""
    bounds = cu_num_logits.numpy()
    counts = np.diff(bounds)
    expanded_idx_mapping.numpy()[:] = np.repeat(idx_mapping.numpy(), counts)
    local = np.arange(int(bounds[-1])) - np.repeat(bounds[:-1], counts)
    expanded_local_pos.numpy()[:] = local


def _post_update(
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    output_bin_counts: torch.Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens: torch.Tensor,
    sampled_tokens_stride: int,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    all_token_ids: torch.Tensor,
    all_token_ids_stride: int,
    total_len: torch.Tensor,
    draft_tokens: torch.Tensor | None = None,
    draft_tokens_out: torch.Tensor | None = None,
    num_draft_tokens: int = 0,
    **launch_options: Any,
) -> None:
    """Append emitted tokens to their requests and advance the computed lengths.

    vLLM 0.33 also passes the drafts that pipeline ranks receive.
    """
    assert output_bin_counts is None and query_start_loc is not None and draft_tokens is None
    slots = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: len(slots) + 1]
    num_computed_tokens.numpy()[slots] += np.diff(starts) - num_rejected.numpy()
    emitted = num_sampled.numpy()
    tokens, lengths, history = sampled_tokens.numpy(), total_len.numpy(), all_token_ids.numpy()
    for row in np.flatnonzero(emitted):
        slot, count = slots[row], emitted[row]
        begin = lengths[slot]
        history[slot, begin : begin + count] = tokens[row, :count]
        lengths[slot] = begin + count
        last_sampled_tokens[slot] = int(tokens[row, count - 1])


_RUNNER = "vllm.v1.worker.gpu."
KERNELS = {
    _RUNNER + "buffer_utils._apply_write_kernel": _apply_write,
    _RUNNER + "block_table._gather_block_tables_kernel": _gather_block_tables,
    _RUNNER + "block_table._compute_slot_mappings_kernel": _compute_slot_mappings,
    _RUNNER + "input_batch._prepare_prefill_inputs_kernel": _prepare_prefill_inputs,
    _RUNNER + "input_batch._prepare_pos_seq_lens_kernel": _prepare_pos_seq_lens,
    _RUNNER
    + "input_batch._combine_sampled_and_draft_tokens_kernel": _combine_sampled_and_draft_tokens,
    _RUNNER + "input_batch._expand_idx_mapping_kernel": _expand_idx_mapping,
    _RUNNER + "input_batch._post_update_kernel": _post_update,
}
