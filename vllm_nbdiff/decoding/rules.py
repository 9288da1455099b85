# SPDX-License-Identifier: Apache-2.0
"""Which masked positions of a canvas are looked at and which are filled, for a batch of requests.

B requests, canvases of L positions, numpy arrays. Source: `generation_utils.py` of
YuchuanTian/NBDiff (`confidence_threshold`, `entropy`, `origin`), section 1.3 of families.md for
what it means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CONFIDENCE, ENTROPY, MARGIN = 0, 1, 2
"""Scores: probability of the token, negative entropy, difference of the two best probabilities."""


def fill_quota(num_masked: np.ndarray, steps_left: np.ndarray) -> np.ndarray:
    """Least number of positions to fill now so that a block is full after `steps_left` steps.

    Args:
        num_masked: [B] int64, masked positions of the canvas.
        steps_left: [B] int64, denoise steps that may still be run, this one included; at least 1.

    Returns:
        [B] int64, at least 1.
    """
    return np.maximum((num_masked + steps_left - 1) // steps_left, 1)


def active_positions(
    masked: np.ndarray, sub_block_length: np.ndarray, quota: np.ndarray
) -> np.ndarray:
    """Masked positions of the leftmost unfinished sub-block.

    A quota larger than what that sub-block has left takes in the following ones.

    Args:
        masked: [B, L] bool.
        sub_block_length: [B] int64.
        quota: [B] int64, from `fill_quota`.

    Returns:
        [B, L] bool, a subset of `masked`.
    """
    count = masked.cumsum(1)
    target = np.minimum(quota, count[:, -1])[:, None]
    # The position of the quota-th masked position: how many come before it.
    last = (count < target).sum(1)
    end = (last // sub_block_length + 1) * sub_block_length
    return masked & (np.arange(masked.shape[1]) < end[:, None])


def select(
    rule: Rule,
    active: np.ndarray,
    confidence: np.ndarray,
    probability: np.ndarray,
    threshold: np.ndarray,
    quota: np.ndarray,
) -> np.ndarray:
    """The `quota` most confident active positions, and those that `rule` also takes.

    Ties go to the leftmost position.

    Args:
        rule: of these requests.
        active: [B, L] bool.
        confidence: [B, L] float, of kind `rule.score`, larger is more confident; read where active.
        probability: [B, L] float, probability of the proposed token; read where active.
        threshold: [B] float, the rule's parameter.
        quota: [B] int64.

    Returns:
        [B, L] bool, a subset of `active` with at least one position where `active` has one.
    """
    order = np.argsort(np.where(active, -confidence, np.inf), axis=1, kind="stable")
    ranked = Ranked(
        active=np.take_along_axis(active, order, axis=1),
        confidence=np.take_along_axis(confidence, order, axis=1),
        probability=np.take_along_axis(probability, order, axis=1),
        threshold=threshold[:, None],
    )
    taken = (np.arange(active.shape[1]) < quota[:, None]) | rule.takes(ranked)
    selected = np.zeros_like(active)
    np.put_along_axis(selected, order, taken, axis=1)
    return active & selected


@dataclass(frozen=True)
class Ranked:
    """Candidates of B requests, most confident first; inactive columns come last."""

    active: np.ndarray  # [B, L] bool
    confidence: np.ndarray  # [B, L] float
    probability: np.ndarray  # [B, L] float
    threshold: np.ndarray  # [B, 1] float


@dataclass(frozen=True)
class Rule:
    """How a step chooses positions beyond the most confident one.

    Attributes:
        score: What `confidence` is: CONFIDENCE, ENTROPY (negative, in nats) or MARGIN.
        takes: [B, L] bool of ranked candidates that are filled too.
        threshold: The parameter's default.
        limit: Its largest value, None: unbounded; the smallest is 0.
    """

    score: int
    takes: Callable[[Ranked], np.ndarray]
    threshold: float
    limit: float | None = 1.0


def above_threshold(ranked: Ranked) -> np.ndarray:
    """Tokens more probable than the threshold."""
    return ranked.probability > ranked.threshold


def within_factor(ranked: Ranked) -> np.ndarray:
    """The largest n with (m + 1)(1 - c_m) < f for every m up to n (Fast-dLLM, arXiv 2505.22618).

    For f at most 1, greedy decoding of so many positions at once equals one at a time if the
    model's marginals are consistent (its theorem 1). The reference code also takes a last candidate
    that fails; this does not.
    """
    count = np.arange(1, ranked.confidence.shape[1] + 1)
    fits = (count + 1) * (1 - ranked.confidence) < ranked.threshold
    return np.logical_and.accumulate(fits, axis=1)


def within_entropy_bound(ranked: Ranked) -> np.ndarray:
    """Positions whose summed entropy, the largest left out, is within the bound, in nats.

    EB-sampler (arXiv 2505.24857): entropies ascend here, so the largest is the last.
    """
    entropy = np.where(ranked.active, -ranked.confidence, 0.0)
    return entropy.cumsum(1) - entropy <= ranked.threshold


def below_entropy(ranked: Ranked) -> np.ndarray:
    """Positions of at most so much entropy, in nats (dParallel, arXiv 2509.26488)."""
    return -ranked.confidence <= ranked.threshold


RULES = {
    "confidence": Rule(CONFIDENCE, above_threshold, 0.9),
    "entropy": Rule(ENTROPY, above_threshold, 1.0),
    "margin": Rule(MARGIN, above_threshold, 1.0),
    "factor": Rule(CONFIDENCE, within_factor, 1.0, None),
    "entropy_bound": Rule(ENTROPY, within_entropy_bound, 0.1, None),
    "entropy_threshold": Rule(ENTROPY, below_entropy, 0.45, None),
    # One position a step; `engine/drafts.py` does several steps in a forward.
    "freedave": Rule(CONFIDENCE, above_threshold, 1.0),
}
"""Rules by the name that `nbdiff_algorithm` gives; add to it in a vLLM plugin of your own, which
every process loads."""
