# SPDX-License-Identifier: Apache-2.0
"""One token, its probability and its confidence for each row of logits.

A row's result depends on that row alone, bit for bit: every sum over the vocabulary is taken block
by block, so that no thread count and no number of neighbours changes its order.

The mask token: a greedy row may name it, as in the reference, which then leaves the position
masked for a later step; a random draw never gives it. A row with a NaN, with +inf or with nothing
but -inf gives token 0 with the least confidence: probability 0, margin 0, entropy infinite.

Source: `sample_tokens` of YuchuanTian/NBDiff, with its broken margin replaced by p(1) - p(2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_nbdiff.decoding.blockwise import (
    invert,
    invert_blocks,
    likeliest,
    negative_entropy,
    padded,
    probability_of,
    runner_up,
)
from vllm_nbdiff.decoding.filters import kept_tokens, kept_weights
from vllm_nbdiff.decoding.rules import CONFIDENCE, ENTROPY, MARGIN

_CHUNK = 8 * 153_376  # logits: what a pass leaves in the cache for the next one
_SORTED = 4096  # tokens of a vocabulary whose rows are filtered together, by sorting
_SPLIT = 32_768  # PyTorch's threads share the sum over a single row of so many numbers


class Asked(NamedTuple):
    """What some row of a batch asks for, known to the host. True where it cannot be ruled out."""

    greedy: bool = True
    sampled: bool = True
    filters: bool = True
    scores: bool = True
    chances: bool = True
    """Probabilities, for more than whether a row means something."""

    @classmethod
    def by(
        cls,
        temperature: np.ndarray,
        top_p: np.ndarray,
        top_k: np.ndarray,
        min_p: np.ndarray,
        algorithm: np.ndarray,
        vocab_size: int,
    ) -> Asked:
        """From columns as in `RowParams`, of the rows or of their requests."""
        sampled = temperature > 0
        return cls(
            greedy=not sampled.all(),
            sampled=bool(sampled.any()),
            filters=bool((sampled & ((top_p < 1) | (top_k < vocab_size) | (min_p > 0))).any()),
            scores=bool((algorithm != CONFIDENCE).any()),
        )


ANYTHING = Asked()


@dataclass(frozen=True)
class RowParams:
    """Sampling parameters of n rows of logits."""

    temperature: Tensor  # [n] float32, 0 = greedy
    top_p: Tensor  # [n] float32, 1 = off
    top_k: Tensor  # [n] int64, at least the vocabulary size = off
    min_p: Tensor  # [n] float32, 0 = off
    algorithm: Tensor  # [n] int64, a score of rules.py
    draw: Tensor  # [n] float64, uniform in [0, 1)
    asked: Asked = ANYTHING

    def __getitem__(self, rows: Tensor) -> RowParams:
        names = ("temperature", "top_p", "top_k", "min_p", "algorithm", "draw")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


class Drawn(NamedTuple):
    """What was drawn for n rows of logits."""

    token: Tensor  # [n] int64
    probability: Tensor  # [n] float32, of the token, in the tempered and filtered distribution
    confidence: Tensor  # [n] float32: probability, negative entropy in nats, or top-2 margin


def is_sound(logits: Tensor) -> Tensor:
    """[n] bool: whether rows [n, V] of logits mean something."""
    return logits.amax(-1).isfinite()


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely token of each row, the first of equals, and its probability.

    Args:
        logits: [n, V], any float dtype, n at least 1.

    Returns:
        token [n] int64, probability [n] float32 (equal to its confidence).
    """
    parts = [_greedy_rows(chunk) for chunk in logits.split(_chunk_rows(logits))]
    if len(parts) == 1:
        return parts[0]
    token, probability = zip(*parts, strict=True)
    return torch.cat(token), torch.cat(probability)


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`greedy`, with 1 for the probability of rows that mean something."""
    values, token = logits.max(-1)
    sound = values.isfinite()
    return token * sound, sound.float()


def _greedy_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`greedy` of few rows."""
    if logits.shape[1] < _SPLIT:
        x = logits.float()
        # NaN where a row means nothing; else at least 1 / V.
        probability = x.softmax(-1).amax(-1).nan_to_num_(nan=0)
        return x.max(-1).indices * (probability > 0), probability
    x = padded(logits)
    best, top = likeliest(x)
    probability = probability_of(x.flatten(1).softmax(-1), best)
    return best, probability.where(top.isfinite(), 0)


def sample(logits: Tensor, params: RowParams, mask_token_id: int) -> Drawn:
    """Draw a token for each row by inverse CDF; greedy rows take the most likely one.

    In PyTorch, for CPU tensors: each row pays for what it asks, and sizes depend on the data.

    Args:
        logits: [n, V], any float dtype.
        params: of the n rows.
        mask_token_id: never drawn.
    """
    sampled = params.temperature > 0
    filtered = (params.top_p < 1) | (params.top_k < logits.shape[1]) | (params.min_p > 0)
    filtered &= sampled
    plain = ~sampled & (params.algorithm == CONFIDENCE)
    # Greedy rows by one formula, whatever else a batch asks for.
    token, probability = _greedy_among(logits, ~sampled)
    drawn = Drawn(token, probability, probability.clone())
    for rows in (~filtered & ~plain).nonzero()[:, 0].split(_chunk_rows(logits)):
        own = sampled[rows]
        part = _sample_unfiltered(logits.index_select(0, rows), params[rows], mask_token_id)
        drawn.token[rows[own]], drawn.probability[rows[own]] = (
            part.token[own],
            part.probability[own],
        )
        drawn.confidence[rows] = part.confidence
    if logits.shape[1] <= _SORTED:
        if len(rows := filtered.nonzero()[:, 0]):
            part = _sample_sorted(logits.index_select(0, rows), params[rows], mask_token_id)
            for column, values in zip(drawn, part, strict=True):
                column[rows] = values
        return drawn
    for row in filtered.nonzero()[:, 0].tolist():
        found = _sample_filtered(logits[row], params[row], mask_token_id)
        for column, value in zip(drawn, found, strict=True):
            column[row] = value
    return drawn


def _greedy_among(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """`greedy` of the rows `wanted` [n] bool; anything for the others."""
    rows = wanted.nonzero()[:, 0]
    if 2 * len(rows) > len(logits):
        # To copy most rows costs more than to take the others too.
        return greedy(logits)
    token, probability = torch.zeros(len(logits), dtype=torch.int64), torch.zeros(len(logits))
    if len(rows):
        token[rows], probability[rows] = greedy(logits.index_select(0, rows))
    return token, probability


def _sample_unfiltered(logits: Tensor, params: RowParams, mask_token_id: int) -> Drawn:
    """`sample` of few rows, greedy or without filters."""
    x = padded(logits)
    flat = x.flatten(1)
    sampled = (params.temperature > 0).nonzero()[:, 0]
    if len(sampled):
        x /= params.temperature.where(params.temperature > 0, 1)[:, None, None]
        flat[sampled, mask_token_id] = -torch.inf
    token, top = likeliest(x)
    sound = top.isfinite()
    p = flat.softmax(-1)
    largest = probability_of(p, token).where(sound, 0)
    if len(sampled):
        token[sampled] = invert_blocks(p[sampled].view(-1, *x.shape[1:]), params.draw[sampled])
        token.masked_fill_(~sound, 0)
    probability = probability_of(p, token).where(sound, 0)
    confidence = probability.clone()
    if len(rows := (params.algorithm == ENTROPY).nonzero()[:, 0]):
        confidence[rows] = negative_entropy(x[rows], top[rows], p[rows]).where(
            sound[rows], -torch.inf
        )
    if len(rows := (params.algorithm == MARGIN).nonzero()[:, 0]):
        confidence[rows] = largest[rows] * (1 - (runner_up(x[rows]) - top[rows]).exp())
        confidence[rows] = confidence[rows].where(sound[rows], 0)
    return Drawn(token, probability, confidence)


def _sample_filtered(
    logits: Tensor, params: RowParams, mask_token_id: int
) -> tuple[int, float, float]:
    """`sample` of one row [V] with filters: token, probability, confidence."""
    x = padded(logits[None])[0].flatten()
    x /= params.temperature
    x[mask_token_id] = -torch.inf
    top = x.max()
    entropy = params.algorithm == ENTROPY
    if not top.isfinite():
        return 0, 0.0, -math.inf if entropy else 0.0
    top_k = int(params.top_k) if params.top_k < len(logits) else len(x)  # off: padding included
    kept = kept_tokens(x, top_k, float(params.top_p), float(params.min_p))
    weight = (x[kept] - top).exp().double()
    p = weight / weight.sum()
    index, _ = invert(p, params.draw)
    probability = float(p[index])
    confidence = probability
    if entropy:
        confidence = float(torch.xlogy(p, p).sum())
    elif params.algorithm == MARGIN:
        best = p.topk(min(2, len(p))).values
        confidence = float(best[0] - best[1:].sum())
    return int(kept[index]), probability, confidence


def _sample_sorted(logits: Tensor, params: RowParams, mask_token_id: int) -> Drawn:
    """`_sample_filtered` of rows [n, V] of a small vocabulary."""
    x = logits.float() / params.temperature[:, None]
    x[:, mask_token_id] = -torch.inf
    sound = is_sound(x)
    x.masked_fill_(~sound[:, None], 0)
    weight = kept_weights(x, params.top_k, params.top_p, params.min_p)
    token, _ = invert(weight, params.draw)
    p = weight / weight.sum(1, keepdim=True)
    probability = probability_of(p, token)
    best = p.topk(2).values
    by_entropy = params.algorithm == ENTROPY
    confidence = torch.where(params.algorithm == MARGIN, best[:, 0] - best[:, 1], probability)
    confidence = torch.where(by_entropy, torch.xlogy(p, p).sum(1), confidence).float()
    broken = torch.where(by_entropy, -torch.inf, 0.0)
    return Drawn(token * sound, probability.float() * sound, confidence.where(sound, broken))


def _chunk_rows(logits: Tensor) -> int:
    return max(_CHUNK // logits.shape[1], 1)
