# SPDX-License-Identifier: Apache-2.0
"""Which masked positions of a canvas are looked at and which are filled, for a batch of requests.

B requests, canvases of L positions, tensors on any device. Source: `generation_utils.py` of
YuchuanTian/NBDiff (`confidence_threshold`, `entropy`, `origin`), section 1.3 of families.md for
what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_nbdiff.decoding.indices import indices

CONFIDENCE, ENTROPY, MARGIN = 0, 1, 2
"""Scores: probability of the token, negative entropy, difference of the two best probabilities."""


def fill_quota(num_masked: Tensor, steps_left: Tensor) -> Tensor:
    """Least number of positions to fill now so that a block is full after `steps_left` steps.

    Args:
        num_masked: [B] int64, masked positions of the canvas.
        steps_left: [B] int64, denoise steps that may still be run, this one included; at least 1.

    Returns:
        [B] int64, at least 1.
    """
    return ((num_masked + steps_left - 1) // steps_left).clamp(min=1)


def even_quota(block_length: Tensor, steps: Tensor, step: Tensor) -> Tensor:
    """Share of a step where a block is split evenly over its steps, the first ones a position more.

    Whatever of the block is known beforehand, and whatever earlier steps filled beside their share
    (SDAR's `generate.py`, LLaDA2.0).

    Args:
        block_length: [B] int64.
        steps: [B] int64, denoise steps a block; at least 1.
        step: [B] int64, steps done.

    Returns:
        [B] int64, at least 1.
    """
    return (block_length // steps + (step < block_length % steps)).clamp(min=1)


def active_positions(masked: Tensor, sub_block_length: Tensor, quota: Tensor | None) -> Tensor:
    """Masked positions of the leftmost unfinished sub-block.

    A quota larger than what that sub-block has left takes in the following ones.

    Args:
        masked: [..., L] bool.
        sub_block_length: [...] int64.
        quota: [...] int64, from `fill_quota`; None: 1.

    Returns:
        [..., L] bool, a subset of `masked`.
    """
    count = masked.cumsum(-1)
    # The position of the quota-th masked position: how many come before it.
    if quota is None:
        last = (count == 0).sum(-1)
    else:
        last = (count < torch.minimum(quota, count[..., -1])[..., None]).sum(-1)
    end = (last // sub_block_length + 1) * sub_block_length
    return masked & (indices(masked.shape[-1], masked.device) < end[..., None])


def select(
    rules: Sequence[int],
    rule: Tensor,
    active: Tensor,
    confidence: Tensor,
    probability: Tensor,
    threshold: Tensor,
    quota: Tensor | None,
) -> Tensor:
    """The `quota` most confident active positions, and those that each request's rule also takes.

    Ties go to the leftmost position.

    Args:
        rules: places in `RULES` of the rules that the requests have.
        rule: [B] int64, of each request.
        active: [B, L] bool.
        confidence: [B, L] float, of kind `rule.score`, larger is more confident; read where active.
        probability: [B, L] float, probability of the proposed token; read where active.
        threshold: [B] float, the rule's parameter.
        quota: [B] int64; None: 1.

    Returns:
        [B, L] bool, a subset of `active` with at least one position where `active` has one.
    """
    known = [list(RULES.values())[place] for place in rules]
    for place, one in zip(rules, known, strict=True):
        if one.leftmost:
            columns = indices(active.shape[1], active.device)
            confidence = torch.where((rule == place)[:, None], -columns.float(), confidence)
    candidates = Ranked(active, confidence, probability, threshold[:, None])
    ranked = confidence.masked_fill(~active, -torch.inf)
    if quota is None and not any(one.ordered for one in known):
        # Of equals the first is found.
        best = ranked.argmax(dim=1, keepdim=True)
        taken = _takes(known, rules, rule, candidates).scatter(1, best, True)
        return active & taken
    order = ranked.argsort(dim=1, descending=True, stable=True)
    taken = _takes(known, rules, rule, candidates.in_order(order))
    least = 1 if quota is None else quota[:, None]
    taken |= indices(active.shape[1], active.device) < least
    return active & torch.zeros_like(active).scatter(1, order, taken)


def _takes(known: list[Rule], rules: Sequence[int], rule: Tensor, ranked: Ranked) -> Tensor:
    """[B, L] bool: what each request's own rule takes."""
    taken = known[0].takes(ranked)
    for place, other in zip(rules[1:], known[1:], strict=True):
        taken = torch.where((rule == place)[:, None], other.takes(ranked), taken)
    return taken


@dataclass(frozen=True)
class Ranked:
    """Candidates of B requests, most confident first; inactive columns come last."""

    active: Tensor  # [B, L] bool
    confidence: Tensor  # [B, L] float
    probability: Tensor  # [B, L] float
    threshold: Tensor  # [B, 1] float

    def in_order(self, order: Tensor) -> Ranked:
        """The candidates in `order` [B, L] int64."""
        return Ranked(
            self.active.gather(1, order),
            self.confidence.gather(1, order),
            self.probability.gather(1, order),
            self.threshold,
        )


@dataclass(frozen=True)
class Rule:
    """How a step chooses positions beyond the most confident one.

    Attributes:
        score: What `confidence` is: CONFIDENCE, ENTROPY (negative, in nats) or MARGIN.
        takes: [B, L] bool of candidates that are filled too.
        threshold: The parameter's default.
        limit: Its largest value, None: unbounded; the smallest is 0.
        ordered: `takes` wants the most confident candidates first; otherwise it judges each by
            itself, in any order, which is faster.
        splits: A step's quota is its even share of the block, `even_quota`, whatever remains.
        leftmost: The quota is filled from left to right, not the most confident first.
        edits: Positions that are filled may be filled again.
    """

    score: int
    takes: Callable[[Ranked], Tensor]
    threshold: float
    limit: float | None = 1.0
    ordered: bool = True
    splits: bool = False
    leftmost: bool = False
    edits: bool = False

    @property
    def is_fixed(self) -> bool:
        """Whether the rule has no parameter."""
        return self.takes is nothing


def nothing(ranked: Ranked) -> Tensor:
    """No position beside the quota."""
    return torch.zeros_like(ranked.active)


def above_threshold(ranked: Ranked) -> Tensor:
    """Tokens more probable than the threshold."""
    return ranked.probability > ranked.threshold


def within_factor(ranked: Ranked) -> Tensor:
    """The largest n with (m + 1)(1 - c_m) < f for every m up to n (Fast-dLLM, arXiv 2505.22618).

    For f at most 1, greedy decoding of so many positions at once equals one at a time if the
    model's marginals are consistent (its theorem 1). The reference code also takes a last candidate
    that fails; this does not.
    """
    count = torch.arange(1, ranked.confidence.shape[1] + 1, device=ranked.confidence.device)
    fits = (count + 1) * (1 - ranked.confidence) < ranked.threshold
    return (~fits).cumsum(1) == 0


def within_entropy_bound(ranked: Ranked) -> Tensor:
    """Positions whose summed entropy, the largest left out, is within the bound, in nats.

    EB-sampler (arXiv 2505.24857): entropies ascend here, so the largest is the last.
    """
    entropy = torch.where(ranked.active, -ranked.confidence, 0.0)
    return entropy.cumsum(1) - entropy <= ranked.threshold


def below_entropy_bound(ranked: Ranked) -> Tensor:
    """Positions whose summed entropy, their own included, is below the bound, in nats (JetEngine,
    which decodes SDAR)."""
    entropy = torch.where(ranked.active, -ranked.confidence, 0.0)
    return entropy.cumsum(1) < ranked.threshold


def below_entropy(ranked: Ranked) -> Tensor:
    """Positions of at most so much entropy, in nats (dParallel, arXiv 2509.26488)."""
    return -ranked.confidence <= ranked.threshold


RULES = {
    "confidence": Rule(CONFIDENCE, above_threshold, 0.9, ordered=False),
    "entropy": Rule(ENTROPY, above_threshold, 1.0, ordered=False),
    "margin": Rule(MARGIN, above_threshold, 1.0, ordered=False),
    "factor": Rule(CONFIDENCE, within_factor, 1.0, None),
    "entropy_bound": Rule(ENTROPY, within_entropy_bound, 0.1, None),
    "entropy_threshold": Rule(ENTROPY, below_entropy, 0.45, None, ordered=False),
    # One position a step; `versions.py` does several steps in a forward.
    "freedave": Rule(CONFIDENCE, above_threshold, 1.0, ordered=False),
    # What SDAR and LLaDA2 call these.
    "low_confidence_dynamic": Rule(CONFIDENCE, above_threshold, 0.9, ordered=False, splits=True),
    "low_confidence_static": Rule(CONFIDENCE, nothing, 1.0, ordered=False, splits=True),
    "sequential": Rule(CONFIDENCE, nothing, 1.0, ordered=False, splits=True, leftmost=True),
    "entropy_bounded": Rule(ENTROPY, below_entropy_bound, 0.1, None, splits=True),
    "edit": Rule(CONFIDENCE, above_threshold, 0.7, ordered=False, edits=True),
}
"""Rules by the name that `nbdiff_algorithm` gives; add to it in a vLLM plugin of your own, which
every process loads."""
_OURS = frozenset(rule.takes for rule in RULES.values())


def refuse_rules_that_read(block_length: int) -> None:
    """Raise ValueError naming a rule of a plugin that asks for values of its tensors.

    With static shapes it would stop every step until the device has computed them. Tensors on
    `meta` have shapes alone.
    """
    flags = torch.ones((2, block_length), dtype=torch.bool, device="meta")
    ranked = Ranked(flags, flags.float(), flags.float(), flags[:, :1].float())
    for name, rule in RULES.items():
        if rule.takes in _OURS:
            continue
        try:
            rule.takes(ranked)
        except Exception as error:
            raise ValueError(
                f"the rule {name!r} must be made of tensors on its arguments' device alone, "
                f"without reading values (.item(), bool(), .cpu()): {error}"
            ) from error
