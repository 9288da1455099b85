# SPDX-License-Identifier: Apache-2.0
"""Invariants of the rules that choose positions."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nbdiff.decoding import rules


@st.composite
def canvases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masked positions [B, L], sub-block lengths [B] that divide L, quotas [B]."""
    length = draw(st.sampled_from([1, 4, 8, 12, 32]))
    batch = draw(st.integers(1, 5))
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    masked = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    sub = draw(st.lists(st.sampled_from(divisors), min_size=batch, max_size=batch))
    least = 1 if draw(st.booleans()) else length
    quota = draw(st.lists(st.integers(1, least), min_size=batch, max_size=batch))
    return np.array(masked).reshape(batch, length), np.array(sub), np.array(quota)


def active_positions(masked: np.ndarray, sub: np.ndarray, quota: np.ndarray) -> np.ndarray:
    return rules.active_positions(*(torch.from_numpy(x) for x in (masked, sub, quota))).numpy()


def select(
    name: str,
    active: np.ndarray,
    confidence: np.ndarray,
    probability: np.ndarray,
    threshold: np.ndarray,
    quota: np.ndarray,
) -> np.ndarray:
    """`rules.select` where half of the requests have another rule beside them in the batch."""
    names = list(rules.RULES)
    place = names.index(name)
    tensors = [torch.from_numpy(x) for x in (active, confidence, probability, threshold, quota)]
    alone = rules.select([place], torch.full((len(active),), place), *tensors)
    other = (place + 1) % len(names)
    twice = [torch.cat([tensor, tensor]) for tensor in tensors]
    rule = torch.tensor([place, other]).repeat_interleave(len(active))
    mixed = rules.select(sorted([place, other]), rule, *twice)
    assert torch.equal(mixed[: len(active)], alone)
    if (quota == 1).all():
        least = rules.select([place], torch.full((len(active),), place), *tensors[:4], None)
        assert torch.equal(least, alone)
    return alone.numpy()


@given(canvases())
def test_active_positions_are_the_leftmost_sub_blocks(
    case: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    masked, sub, quota = case
    active = active_positions(masked, sub, quota)
    for row, size, least, chosen in zip(masked, sub.tolist(), quota.tolist(), active, strict=True):
        expected = np.zeros_like(row)
        for begin in range(0, len(row), size):
            if expected.sum() >= least:
                break
            expected[begin : begin + size] = row[begin : begin + size]
        assert chosen.tolist() == expected.tolist()


@given(canvases(), st.randoms(use_true_random=False))
def test_select(case: tuple[np.ndarray, np.ndarray, np.ndarray], random: st.DataObject) -> None:
    masked, sub, quota = case
    active = active_positions(masked, sub, quota)
    # Few distinct values, so that ties occur.
    confidence = np.array([random.randint(0, 3) - 1.0 for _ in range(masked.size)])
    confidence = confidence.reshape(masked.shape)
    probability = np.array([random.random() for _ in range(masked.size)]).reshape(masked.shape)
    threshold = np.array([random.choice([0.0, 0.5, 1.0]) for _ in range(len(masked))])
    taken = select("confidence", active, confidence, probability, threshold, quota)
    for b in range(len(masked)):
        candidates = active[b].nonzero()[0].tolist()
        best = sorted(candidates, key=lambda i: (-float(confidence[b, i]), i))[: int(quota[b])]
        likely = [i for i in candidates if probability[b, i] > threshold[b]]
        assert set(taken[b].nonzero()[0].tolist()) == set(best) | set(likely)


@given(st.integers(1, 64), st.integers(1, 70))
def test_quota_fills_a_block_in_time(masked: int, steps: int) -> None:
    left = masked
    for done in range(steps):
        (quota,) = rules.fill_quota(torch.tensor([left]), torch.tensor([steps - done]))
        assert quota >= 1
        left = max(left - int(quota), 0)
    assert left == 0


@given(st.integers(1, 64), st.integers(1, 70))
def test_even_quotas_are_the_shares_of_a_block(length: int, steps: int) -> None:
    args = torch.tensor([length]), torch.tensor([steps])
    shares = [int(rules.even_quota(*args, torch.tensor([step]))) for step in range(steps)]
    assert sum(shares) == max(length, steps)
    assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= 1


@given(canvases(), st.sampled_from(sorted(rules.RULES)), st.randoms(use_true_random=False))
def test_every_rule_makes_progress_within_the_active_positions(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], name: str, random: st.DataObject
) -> None:
    masked, sub, quota = case
    rule = rules.RULES[name]
    active = active_positions(masked, sub, quota)
    # Few distinct values, so that ties occur.
    probability = np.array([random.randint(0, 4) / 4 for _ in range(masked.size)])
    probability = probability.reshape(masked.shape)
    confidence = probability if rule.score == rules.CONFIDENCE else probability - 1
    threshold = np.array([random.choice([0.0, 0.4, 1.0]) for _ in range(len(masked))])
    columns = np.broadcast_to(-np.arange(masked.shape[1]), masked.shape)
    ranks = columns if name == "sequential" else confidence
    taken = select(name, active, confidence, probability, threshold, quota)
    assert not (taken & ~active).any()
    assert (taken.sum(1) >= np.minimum(quota, active.sum(1))).all()
    for b in range(len(masked)):
        order = sorted(np.flatnonzero(active[b]), key=lambda i: (-ranks[b, i], i))
        also = ORACLES.get(name, above_threshold)(
            [(float(confidence[b, i]), float(probability[b, i])) for i in order], threshold[b]
        )
        expected = set(order[: quota[b]]) | {order[i] for i in also}
        assert set(np.flatnonzero(taken[b])) == expected


def above_threshold(ranked: list[tuple[float, float]], threshold: float) -> list[int]:
    return [i for i, (_, probability) in enumerate(ranked) if probability > threshold]


def within_factor(ranked: list[tuple[float, float]], factor: float) -> list[int]:
    taken: list[int] = []
    for n, (confidence, _) in enumerate(ranked, start=1):
        if (n + 1) * (1 - confidence) >= factor:
            break
        taken.append(n - 1)
    return taken


def within_entropy_bound(ranked: list[tuple[float, float]], bound: float) -> list[int]:
    entropies = [-confidence for confidence, _ in ranked]
    return [
        i
        for i in range(len(ranked))
        if sum(entropies[: i + 1]) - max(entropies[: i + 1]) <= bound + 1e-12
    ]


def below_entropy(ranked: list[tuple[float, float]], limit: float) -> list[int]:
    return [i for i, (confidence, _) in enumerate(ranked) if -confidence <= limit]


def below_entropy_bound(ranked: list[tuple[float, float]], bound: float) -> list[int]:
    sums = np.cumsum([-confidence for confidence, _ in ranked])
    return list(range(int((sums < bound).sum())))


def nothing(ranked: list[tuple[float, float]], threshold: float) -> list[int]:
    return []


ORACLES = {
    "entropy_bounded": below_entropy_bound,
    "low_confidence_static": nothing,
    "sequential": nothing,
    "factor": within_factor,
    "entropy_bound": within_entropy_bound,
    "entropy_threshold": below_entropy,
}
