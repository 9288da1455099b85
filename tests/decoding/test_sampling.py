# SPDX-License-Identifier: Apache-2.0
"""Row sampling against direct formulas in float64."""

import pytest
import torch
from scipy.stats import chisquare
from vllm_nbdiff.kernels.uniform import uniform

from vllm_nbdiff.decoding.rules import CONFIDENCE, ENTROPY, MARGIN
from vllm_nbdiff.decoding.sampling import RowParams, sample, sample_greedy

MASK = 3


def params(rows: int, **values: float) -> RowParams:
    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), values.get(name, default), dtype=dtype)

    seeds = torch.arange(rows) * 7919
    return RowParams(
        temperature=column("temperature", 0, torch.float32),
        top_p=column("top_p", 1, torch.float32),
        top_k=column("top_k", 1 << 20, torch.int64),
        min_p=column("min_p", 0, torch.float32),
        algorithm=column("algorithm", CONFIDENCE, torch.int64),
        draw=uniform(seeds, torch.zeros_like(seeds), torch.zeros_like(seeds)),
    )


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy(rows: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, 211, generator=torch.Generator().manual_seed(rows)).to(dtype) * 4
    exact = logits.double().softmax(-1)
    token, probability = sample_greedy(logits)
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(
        probability.double(), exact.max(-1).values, rtol=1e-5, atol=1e-7, check_dtype=False
    )
    for algorithm, expected in {
        CONFIDENCE: exact.max(-1).values,
        ENTROPY: (exact * exact.log()).sum(-1),
        MARGIN: exact.topk(2).values @ torch.tensor([1.0, -1.0], dtype=torch.float64),
    }.items():
        again, chance, confidence = sample(logits, params(rows, algorithm=algorithm), MASK)
        assert torch.equal(again, token)
        torch.testing.assert_close(chance, probability, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(confidence.double(), expected, rtol=1e-5, atol=1e-5)


def expected_distribution(
    logits: torch.Tensor, temperature: float, top_p: float, top_k: int, min_p: float
) -> torch.Tensor:
    """Filters one after the other, as in section 1.3 of the reference; float64."""
    logits = logits.double().clone()
    logits[MASK] = -torch.inf
    probs = (logits / temperature).softmax(-1)
    keep = probs >= min_p * probs.max()
    probs = torch.where(keep, probs, 0) / probs[keep].sum()
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    kept = order[(before <= top_p) & (torch.arange(len(order)) < top_k)]
    result = torch.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 0.9, "top_k": 5, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(settings: dict[str, float]) -> None:
    n = 100_000
    logits = torch.tensor([1.2, 0.3, -0.5, 2.0, 0.9, -1.0, 0.1, 1.7, -2.0, 0.6])
    filters = {"top_p": 1.0, "top_k": 10, "min_p": 0.0} | settings
    exact = expected_distribution(logits, **filters)
    token, probability, _ = sample(logits.repeat(n, 1), params(n, **settings), MASK)
    torch.testing.assert_close(probability.double(), exact[token], rtol=1e-5, atol=1e-6)
    counts = torch.bincount(token, minlength=10).double()
    support = exact > 0
    assert counts[~support].sum() == 0 and counts[MASK] == 0
    assert chisquare(counts[support], exact[support] * n).pvalue > 1e-4


def test_uniform_is_keyed_and_uniform() -> None:
    n = 50_000
    seed = torch.full((n,), 17)
    position, step = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    draws = uniform(seed, position, step)
    assert draws.dtype == torch.float64 and draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, bins=50, min=0, max=1)
    assert chisquare(counts).pvalue > 1e-4
    assert torch.equal(uniform(seed[:3], position[:3], step[:3]), draws[:3])
    for other in (uniform(seed + 1, position, step), uniform(seed, position, step + 1)):
        assert not torch.isclose(other, draws).any()
        assert abs(torch.corrcoef(torch.stack([other, draws]))[0, 1]) < 0.02
