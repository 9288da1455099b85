# SPDX-License-Identifier: Apache-2.0
"""LoRA on a CPU: what adapters add, computed adapter by adapter.

vLLM's own operations gather the weights of every row, and for a row without an adapter, index -1,
those of the last adapter (see `compat/lora.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class AdapterRows(NamedTuple):
    """The rows of one adapter."""

    slot: int  # of the adapter in stacked weights
    rows: Tensor | slice  # [n] int64, or all


def rows_by_adapter(indices: Tensor) -> list[AdapterRows]:
    """The adapters of rows, `indices` [T] int64; rows with -1 have none."""
    found = indices.unique().tolist()
    if len(found) == 1 and found[0] >= 0:
        return [AdapterRows(found[0], slice(None))]
    return [AdapterRows(i, (indices == i).nonzero()[:, 0]) for i in found if i >= 0]


def add_product(
    y: Tensor, x: Tensor, weights: Tensor, groups: list[AdapterRows], scale: float = 1.0
) -> None:
    """Add to `y` [T, out] the products of `x` [T, in] with `weights` [adapters, 1, out, in].

    In float32 where either is; other rows stay. `y` may have more columns than weights have rows,
    or fewer: layers pad differently.
    """
    for slot, rows in groups:
        weight = weights[slot].squeeze(0)
        dtype = torch.promote_types(y.dtype, torch.promote_types(x.dtype, weight.dtype))
        product = scale * (x[rows].to(dtype) @ weight.to(dtype).T)
        width = min(y.shape[1], product.shape[1])
        y[rows, :width] += product[:, :width].to(y.dtype)


class RowWisePunica(PunicaWrapperCPU):
    """vLLM's interface between layers and adapters, for rows in any order and number."""

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Take the adapters of the coming forward's rows and of its rows of logits."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.group_rows()

    def group_rows(self) -> None:
        """Take the indices of rows as they are now."""
        self._tokens = rows_by_adapter(self.token_lora_indices)
        self._logits = rows_by_adapter(self.sampler_indices)

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        add_product(y, x, w_t_all, self._tokens, scale)

    def _apply_expand(
        self,
        y: Tensor,
        x: Tensor,
        w_t_all: Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        add_product(y[:, y_offset : y_offset + y_slice_size], x, w_t_all, self._tokens)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add to embeddings `y` [T, hidden] what adapters do, from `x` [T, rank]."""
        add_product(y, x, lora_b_stacked, self._tokens)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to logits `y` [n, V] what adapters do, from `x` [n, hidden]."""
        inner = x.new_zeros((len(x), lora_b_stacked.shape[-1]), dtype=torch.float32)
        add_product(inner, x, lora_a_stacked, self._logits, scale)
        add_product(y, inner, lora_b_stacked, self._logits)
