# SPDX-License-Identifier: Apache-2.0
"""PyTorch stand-ins for vLLM's kernels that score prompts; see cpu_kernels.py."""

from __future__ import annotations

import torch


def _prompt_logprobs_token_ids(
    token_ids: torch.Tensor,
    query_start_loc: torch.Tensor,
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    all_token_ids: torch.Tensor,
    all_token_ids_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """The token that follows each scheduled one; any token behind the longest text."""
    token_ids.zero_()
    starts = query_start_loc.tolist()
    for row, slot in enumerate(idx_mapping.tolist()):
        begin, end = starts[row], starts[row + 1]
        first = int(num_computed_tokens[slot]) + 1
        following = all_token_ids[slot, first : first + end - begin]
        token_ids[begin : begin + len(following)] = following


def _topk_log_softmax(
    output: torch.Tensor,
    logits: torch.Tensor,
    logits_stride: int,
    topk_ids: torch.Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """Log-probabilities of the tokens asked for in each row."""
    x = logits.float()
    output.copy_(x.gather(1, topk_ids) - x.logsumexp(1, keepdim=True))


def _ranks(
    output: torch.Tensor,
    logits: torch.Tensor,
    logits_stride: int,
    token_ids: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """How many tokens of each row are at least as likely as the given one."""
    output.copy_((logits >= logits.gather(1, token_ids[:, None].long())).sum(1))


_RUNNER = "vllm.v1.worker.gpu."
KERNELS = {
    _RUNNER + "sample.prompt_logprob._prompt_logprobs_token_ids_kernel": _prompt_logprobs_token_ids,
    _RUNNER + "sample.logprob._topk_log_softmax_kernel": _topk_log_softmax,
    _RUNNER + "sample.logprob._ranks_kernel": _ranks,
}
