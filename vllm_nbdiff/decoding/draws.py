# SPDX-License-Identifier: Apache-2.0
"""Draws for rows of logits by what the device has: Triton kernels or PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_nbdiff.decoding.rules import ENTROPY, MARGIN
from vllm_nbdiff.decoding.sampling import Asked, Drawn, RowParams, best, greedy, sample


def has_kernels(logits: Tensor) -> bool:
    """Whether Triton kernels run where `logits` lie."""
    return logits.is_cuda


def draw_rows(
    logits: Tensor,
    params: RowParams | None,
    mask_token_id: int,
    needed: Tensor | None = None,
    chances: bool = True,
) -> Drawn:
    """`sample` by what the device has: Triton's kernels on a GPU, PyTorch elsewhere.

    Nothing is read back from a GPU; `params.asked` says which kernels it has to run.

    Args:
        logits: [n, V], float32, float16 or bfloat16.
        params: of the n rows; None: greedy, ranked by their probability.
        mask_token_id: never drawn; a greedy row may name it.
        needed: [n] bool; other rows are not read and come back as token -1, probability 0.
        chances: whether probabilities are used for more than whether a row means something; on a
            CPU they cost more than the tokens.
    """
    if has_kernels(logits):
        if needed is None:  # one variant of each kernel serves any rows
            needed = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if params is None:
            return _greedy_on_device(logits, needed)
        return _draw_on_device(logits, params, mask_token_id, needed)
    if params is None:
        return _draw_greedily(logits, needed, chances)
    if needed is None:
        return sample(logits, params, mask_token_id)
    rows = needed.nonzero()[:, 0]
    # `index_select` copies a row as a whole, indexing number by number.
    drawn = sample(logits.index_select(0, rows), params[rows], mask_token_id)
    return _spread(rows, drawn, len(logits))


def compile_kernels(logits: Tensor) -> None:
    """Run every variant of the kernels that `draw_rows` asks for on rows like `logits` [1, V], of
    which none is needed."""
    needed = torch.zeros(1, dtype=torch.bool, device=logits.device)
    one = torch.ones(1, device=logits.device)
    _greedy_on_device(logits, needed)
    for filters in (False, True):
        asked = Asked(greedy=False, sampled=True, filters=filters, scores=False)
        params = RowParams(one, one, one.long(), one, one.long(), one.double(), asked)
        _draw_on_device(logits, params, 0, needed)


def _draw_greedily(logits: Tensor, needed: Tensor | None, chances: bool) -> Drawn:
    draw = greedy if chances else best
    if needed is None:
        token, probability = draw(logits)
        return Drawn(token, probability, probability)
    rows = needed.nonzero()[:, 0]
    token, probability = draw(logits.index_select(0, rows))
    return _spread(rows, Drawn(token, probability, probability), len(logits))


def _spread(rows: Tensor, drawn: Drawn, count: int) -> Drawn:
    """What was drawn for `rows` of `count`."""
    token = torch.full((count,), -1)
    token[rows] = drawn.token
    probability, confidence = torch.zeros(2, count)
    probability[rows], confidence[rows] = drawn.probability, drawn.confidence
    return Drawn(token, probability, confidence)


def _greedy_on_device(logits: Tensor, needed: Tensor) -> Drawn:
    from vllm_nbdiff.kernels.row_statistics import row_statistics

    found = row_statistics(logits, needed=needed)
    return Drawn(found.token.long(), found.probability, found.probability)


def _draw_on_device(logits: Tensor, params: RowParams, mask_token_id: int, needed: Tensor) -> Drawn:
    from vllm_nbdiff.kernels.row_sample import row_sample
    from vllm_nbdiff.kernels.row_statistics import row_statistics

    asked = params.asked
    sampled = params.temperature > 0
    found: Any = None
    if asked.greedy:
        found = row_statistics(logits, needed=needed & ~sampled if asked.sampled else needed)
    if asked.sampled:
        filters = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
        drawn = row_sample(
            logits,
            draw=params.draw,
            temperature=params.temperature,
            banned_id=mask_token_id,
            needed=needed & sampled if asked.greedy else needed,
            **(filters if asked.filters else {}),
        )
        if found is None:
            found = drawn
        else:
            # The four columns that both have come first.
            found = type(drawn)(
                *(torch.where(sampled, a, b) for a, b in zip(drawn, found, strict=False))
            )
    confidence = found.probability
    if asked.scores:
        confidence = torch.where(params.algorithm == ENTROPY, -found.entropy, confidence)
        confidence = torch.where(params.algorithm == MARGIN, found.margin, confidence)
    return Drawn(found.token.long(), found.probability, confidence)
