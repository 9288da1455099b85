# SPDX-License-Identifier: Apache-2.0
"""Row sampling against direct formulas in float64 and against vLLM's own filters."""

import pytest
import torch
from scipy.stats import chisquare
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm_nbdiff.kernels.uniform import uniform

from vllm_nbdiff.decoding.filters import BLOCK, kept_tokens, kept_weights
from vllm_nbdiff.decoding.rules import CONFIDENCE, ENTROPY, MARGIN
from vllm_nbdiff.decoding.sampling import RowParams, greedy, sample

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


def random_params(rows: int) -> RowParams:
    """Greedy and sampled rows, each filter on in some, every score."""
    off = torch.rand(4, rows) < 0.4
    return RowParams(
        temperature=(torch.rand(rows) + 0.3).masked_fill(off[0], 0),
        top_p=torch.rand(rows).clamp(min=0.05).masked_fill(off[1], 1),
        top_k=torch.randint(1, 60, (rows,)).masked_fill(off[2], 1 << 20),
        min_p=(torch.rand(rows) * 0.1).masked_fill(off[3], 0),
        algorithm=torch.randint(0, 3, (rows,)),
        draw=torch.rand(rows, dtype=torch.float64),
    )


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy(rows: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, 211, generator=torch.Generator().manual_seed(rows)).to(dtype) * 4
    exact = logits.double().softmax(-1)
    token, probability = greedy(logits)
    # The first of equals, which argmax does not promise.
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(token, first)
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
        assert torch.equal(chance, probability)
        torch.testing.assert_close(confidence.double(), expected, rtol=1e-5, atol=1e-5)


def by_vllm(x: torch.Tensor, top_k: int | None, top_p: float | None, min_p: float) -> torch.Tensor:
    """Logits [V] float64 that vLLM's filters leave, -inf elsewhere; min_p as its kernel has it."""
    if min_p:
        x = x.masked_fill(x < x.max() + torch.tensor(min_p).log(), -torch.inf)
    k = None if top_k is None else torch.tensor([top_k])
    p = None if top_p is None else torch.tensor([top_p], dtype=torch.float64)
    return apply_top_k_top_p_pytorch(x[None].clone(), k, p)[0]


@pytest.mark.parametrize("min_p", [0.0, 0.03])
@pytest.mark.parametrize("top_p", [None, 0.999, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [None, 1, 5, 300, 2000])
def test_filters_are_those_of_vllm(top_k: int | None, top_p: float | None, min_p: float) -> None:
    """The same logits are left, on rows full of ties; of equal ones at the boundary of top_p, which
    ones is open in vLLM and the first in ours."""
    torch.manual_seed(5)
    for scale in (0.0, 0.3, 3.0, 30.0):
        x = (torch.randn(17 * BLOCK) * scale).mul(4).round().div(4)
        x[::7] = -torch.inf
        expected = by_vllm(x.double(), top_k, top_p, min_p)
        expected = expected[expected > -torch.inf].float()
        token = kept_tokens(x, top_k or len(x), top_p or 1.0, min_p)
        assert torch.equal(token, token.unique())
        assert torch.equal(x[token].sort().values, expected.sort().values)
        equal = (x == x[token].min()).nonzero()[:, 0]
        assert torch.equal(
            token[x[token] == x[token].min()], equal[: (x[token] == x[token].min()).sum()]
        )


def test_filters_without_ties_keep_the_tokens_of_vllm() -> None:
    torch.manual_seed(6)
    x = torch.randn(2000 * BLOCK) * 2
    for top_k, top_p, min_p in [(None, 0.9, 0.0), (50, 0.7, 0.0), (9000, 0.95, 0.01)]:
        expected = by_vllm(x.double(), top_k, top_p, min_p)
        token = kept_tokens(x, top_k or len(x), top_p, min_p)
        assert torch.equal(token, (expected > -torch.inf).nonzero()[:, 0])


def test_rows_filtered_together_keep_the_same_tokens() -> None:
    """With ties, banned tokens and every mixture of filters; weights are those of the softmax."""
    torch.manual_seed(5)
    n, size = 400, 5 * BLOCK
    x = (torch.randn(n, size) * 4).round(decimals=1)
    x[torch.rand(n, size) < 0.2] = -torch.inf
    top_k = torch.randint(1, size + 40, (n,))
    top_p = torch.rand(n).clamp(min=1e-3).where(torch.rand(n) < 0.7, 1)
    min_p = torch.rand(n).where(torch.rand(n) < 0.5, 0) ** 3
    weight = kept_weights(x, top_k, top_p, min_p)
    for row in range(n):
        kept = kept_tokens(x[row], int(top_k[row]), float(top_p[row]), float(min_p[row]))
        # What is too unlikely for a number has no weight.
        alive = kept[(x[row, kept] - x[row].max()).exp() > 0]
        assert weight[row].nonzero()[:, 0].tolist() == alive.tolist()
        exact = x[row, alive].double().softmax(0)
        assert torch.allclose(weight[row, alive] / weight[row].sum(), exact, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 0.9, "top_k": 5, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "min_p": 0.3, "top_k": 6, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(settings: dict[str, float]) -> None:
    n = 3_000
    logits = torch.tensor([1.2, 0.3, -0.5, 2.0, 0.9, -1.0, 0.1, 1.7, -2.0, 0.6])
    filters = {"top_p": None, "top_k": None, "min_p": 0.0} | settings
    tempered = logits.double() / filters.pop("temperature")
    tempered[MASK] = -torch.inf
    exact = by_vllm(tempered, **filters).softmax(-1)
    token, probability, _ = sample(logits.repeat(n, 1), params(n, **settings), MASK)
    torch.testing.assert_close(probability.double(), exact[token], rtol=1e-5, atol=1e-6)
    counts = torch.bincount(token, minlength=10).double()
    support = exact > 0
    assert counts[~support].sum() == 0 and counts[MASK] == 0
    assert chisquare(counts[support], exact[support] * n).pvalue > 1e-4


def test_scores_of_sampled_rows_are_those_of_the_filtered_distribution() -> None:
    torch.manual_seed(7)
    logits, asked = torch.randn(60, 500) * 2, random_params(60)
    drawn = sample(logits, asked, MASK)
    for row in range(60):
        x = logits[row].double()
        if asked.temperature[row] > 0:
            x = x / asked.temperature[row]
            x[MASK] = -torch.inf
            k = min(int(asked.top_k[row]), 500)
            top_p = float(asked.top_p[row])
            x = by_vllm(x, k, top_p if top_p < 1 else None, float(asked.min_p[row]))
        p = x.softmax(-1)
        best = p.topk(2).values
        expected = [p[drawn.token[row]], -torch.special.entr(p).sum(), best[0] - best[1]]
        assert abs(drawn.probability[row] - expected[0]) < 1e-5
        assert abs(drawn.confidence[row] - expected[int(asked.algorithm[row])]) < 1e-4


def test_rare_tokens_keep_their_probability() -> None:
    """The share of [0, 1) that draws a token is its probability, to 1e-4 of itself at 1e-9."""
    torch.manual_seed(8)
    logits = torch.randn(1, 40 * BLOCK) * 3
    logits[0, MASK] = -torch.inf
    p = logits[0].double().softmax(-1)
    rare = ((p > 1e-9) & (p < 1e-8)).nonzero()[:20, 0]
    rows, settings = logits.expand(len(rare), -1), params(len(rare), temperature=1)

    def first_draw(token: torch.Tensor) -> torch.Tensor:
        """Smallest draw of a token or one behind it, by bisection."""
        low, high = torch.zeros(2, len(token), dtype=torch.float64)
        high += 1
        for _ in range(53):
            settings.draw[:] = (low + high) / 2
            behind = sample(rows, settings, MASK).token >= token
            high, low = settings.draw.where(behind, high), settings.draw.where(~behind, low)
        return high

    share = first_draw(rare + 1) - first_draw(rare)
    torch.testing.assert_close(share, p[rare], rtol=1e-4, atol=0)


# The larger one is more than PyTorch gives to one thread.
@pytest.mark.parametrize("vocab", [1_001, 50_001])
def test_a_row_does_not_depend_on_its_neighbours(vocab: int) -> None:
    torch.manual_seed(9)
    for dtype in (torch.float32, torch.bfloat16):
        logits, asked = (torch.randn(128, vocab) * 2).to(dtype), random_params(128)
        together = sample(logits, asked, MASK)
        best = greedy(logits)
        for n in (1, 3, 17):
            rows = torch.randperm(128)[:n]
            alone = sample(logits[rows], asked[rows], MASK)
            for ours, theirs in zip(alone, together, strict=True):
                assert torch.equal(ours, theirs[rows])
            for ours, theirs in zip(greedy(logits[rows]), best, strict=True):
                assert torch.equal(ours, theirs[rows])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("algorithm", [CONFIDENCE, ENTROPY, MARGIN])
def test_rows_without_a_distribution(algorithm: int, temperature: float, top_p: float) -> None:
    logits = torch.randn(4, 300)
    logits[0] = -torch.inf
    logits[1, 7] = torch.nan
    logits[2, 7] = torch.inf
    settings = params(4, temperature=temperature, top_p=top_p, algorithm=algorithm)
    token, probability, confidence = sample(logits, settings, MASK)
    least = -torch.inf if algorithm == ENTROPY else 0.0
    assert token[:3].tolist() == [0, 0, 0]
    assert probability[:3].tolist() == [0, 0, 0]
    assert confidence[:3].tolist() == [least] * 3
    assert probability[3] > 0
    token, probability = greedy(logits)
    assert token[:3].tolist() == [0, 0, 0] and probability[:3].tolist() == [0, 0, 0]


def test_no_rows() -> None:
    for column in sample(torch.zeros(0, 300), params(0), MASK):
        assert column.shape == (0,)


def test_the_largest_draw_names_a_token_of_positive_probability() -> None:
    logits = torch.full((2, 2 * BLOCK), -torch.inf)
    logits[:, [5, BLOCK + 9]] = torch.tensor([0.0, -1.0])
    for top_k in (1 << 20, 2):
        settings = params(2, temperature=1, top_k=top_k)
        settings.draw[0], settings.draw[1] = 0.0, 1 - 2**-53
        assert sample(logits, settings, MASK).token.tolist() == [5, BLOCK + 9]


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
