# SPDX-License-Identifier: Apache-2.0
"""The training attention mask of block diffusion (NBDiff, arXiv 2512.06776).

One function says who sees whom. FlexAttention takes it as its ``mask_mod``, SDPA as the dense mask
that it spans.
"""

from collections.abc import Callable
from typing import Any

import torch

from vllm_nbdiff.families.family import ContextMask

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

PAD = torch.iinfo(torch.int64).min
"""Block number of a padded column, which nobody sees."""


def block_numbers(
    num_prompt: int, num_answer: int, block_length: int, prompt_padding: torch.Tensor
) -> torch.Tensor:
    """Number the columns of left-padded rows whose answers all start at column ``num_prompt``.

    The grid is counted from there in both directions. Of a prompt that is cut at a multiple of the
    block length (:func:`~vllm_nbdiff.adapt.data.cut_at_block`) it is the grid of the whole text.

    Args:
        num_prompt: Prompt columns, padding included.
        num_answer: Answer columns.
        block_length: Tokens of a block.
        prompt_padding: ``[rows]`` int64, padded columns on the left of each row.

    Returns:
        ``[rows, num_prompt + num_answer]`` int64: ``PAD`` or the block's number, negative in the
        prompt.
    """
    column = torch.arange(num_prompt + num_answer, device=prompt_padding.device)
    number = (column - num_prompt) // block_length
    return torch.where(column < prompt_padding[:, None], PAD, number)


def training_mask(block: torch.Tensor, num_noised: int, context: ContextMask = "causal") -> MaskMod:
    """Who sees whom in the concatenated input ``[noised ; clean]``.

    The noised half repeats the last ``num_noised`` columns of the clean half. A noised token sees
    its own noised block in both directions and all strictly earlier clean blocks; a clean token
    sees clean tokens up to itself (``block-causal``: up to the end of its block) and never a noised
    one. A padded token sees only itself, so that no row of the softmax is empty.

    Args:
        block: ``[rows, length]`` int64 of the clean half, see :func:`block_numbers`.
        num_noised: Columns of the noised half, at most ``length``.
        context: Mask of the clean half.

    Returns:
        ``sees(row, head, query, key)`` on int tensors that broadcast, bool of their joint shape.
    """
    number = torch.cat([block[:, block.shape[1] - num_noised :], block], dim=1)

    def sees(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        block_q, block_k = number[row, query], number[row, key]
        noised_q, noised_k = query < num_noised, key < num_noised
        by_noised = torch.where(noised_k, block_k == block_q, block_k < block_q)
        reached = key <= query if context == "causal" else block_k <= block_q
        visible = torch.where(noised_q, by_noised, ~noised_k & reached)
        return (visible & (block_k != PAD)) | (query == key)

    return sees


def attention_mask(
    sees: MaskMod, rows: int, size: int, device: torch.device, implementation: str = "sdpa"
) -> Any:
    """``sees`` in the form that the model's attention takes.

    Args:
        sees: A mask function.
        rows: Rows of the batch.
        size: Columns, noised and clean together.
        device: Where the model runs.
        implementation: transformers' ``attn_implementation``: ``sdpa`` or ``flex_attention``.

    Returns:
        ``[rows, 1, size, size]`` bool, True where query (dim 2) sees key (dim 3); for
        ``flex_attention`` the ``BlockMask`` of the same rule, which skips the empty tiles.

    Raises:
        ValueError: For any other implementation, which would take the mask for something else.
    """
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, rows, None, size, size, device=str(device))
    if implementation != "sdpa":
        raise ValueError(f"attention must be 'sdpa' or 'flex_attention', got {implementation!r}")
    column = torch.arange(size, device=device)
    row = torch.arange(rows, device=device)[:, None, None, None]
    return sees(row, torch.zeros_like(row), column[:, None], column[None, :])
