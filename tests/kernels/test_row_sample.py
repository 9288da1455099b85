# SPDX-License-Identifier: Apache-2.0
"""Draws against the sorting fp64 reference, and against the distribution they claim to follow."""

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from vllm_nbdiff.kernels import row_sample as module
from vllm_nbdiff.kernels.logit_filter import filtered_probabilities_reference
from vllm_nbdiff.kernels.row_sample import TILE, row_sample, row_sample_reference
from vllm_nbdiff.kernels.uniform import uniform

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps


def keys(rows: int) -> dict[str, Tensor]:
    return {
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,)),
        "position": torch.randint(0, 2**31, (rows,)),
        "step": torch.randint(0, 64, (rows,), dtype=torch.int32),
    }


def random_filters(rows: int) -> dict[str, Tensor]:
    """Each filter on in some rows and off in others."""
    off = torch.rand(3, rows) < 0.4
    return {
        "top_k": torch.randint(1, 20, (rows,), dtype=torch.int32).masked_fill(off[0], 0),
        "top_p": torch.rand(rows).masked_fill(off[1], 1.0),
        "min_p": (torch.rand(rows) * 0.3).masked_fill(off[2], 0.0),
    }


def assert_draws_match(logits: Tensor, **options: Any) -> None:
    """Tokens equal the reference's unless the uniform lies on a step of the CDF within fp32's
    error of it; probabilities agree to that error.

    A weight 2^d carries the rounding of d, |d| eps, on top of a few eps of its own.
    """
    drawn = keys(len(logits))
    ours = row_sample(logits, **drawn, **options)
    exact = row_sample_reference(logits, **drawn, **options)
    temperature = options.get("temperature")
    spread = logits.float().nan_to_num(neginf=0).abs().amax(dim=1) * 2 + 8
    if temperature is not None:
        spread = spread / torch.where(temperature < 1e-5, 1.0, temperature)
    tolerance = 4 * EPS * spread
    same = ours.token == exact.token
    assert ((ours.probability - exact.probability).abs() <= tolerance)[same].all()
    p = filtered_probabilities_reference(logits, **options)
    draws = uniform(**drawn)
    for row in (~same).nonzero()[:, 0].tolist():
        step = p[row].cumsum(dim=0)[min(ours.token[row], exact.token[row])]
        assert abs(step - draws[row]) <= tolerance[row]
    assert same.double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 1), (3, 2), (300, 13), (1, TILE), (2, TILE + 1), (2, 9001)]
)
def test_draws(rows: int, vocab: int, dtype: torch.dtype) -> None:
    assert_draws_match((torch.randn(rows, vocab) * 3).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_with_filters(dtype: torch.dtype) -> None:
    assert_draws_match((torch.randn(500, 61) * 3).to(dtype), **random_filters(500))


def test_draws_with_filters_over_several_tiles() -> None:
    assert_draws_match((torch.randn(3, 9001) * 3).half(), **random_filters(3))


def test_draws_with_everything() -> None:
    temperature = torch.rand(400) * 2
    temperature[::5] = 0
    logits = (torch.randn(400, 61) * 3).bfloat16()
    logits[:, ::4] = -torch.inf
    bias = torch.randn(61)
    bias[5] = -torch.inf
    assert_draws_match(logits, temperature=temperature, bias=bias, **random_filters(400))


def test_ties_pass_or_fail_together() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, -0.0, 2.0]]).repeat(600, 1)
    top_k = torch.full((600,), 2, dtype=torch.int32)
    drawn = row_sample(logits, **keys(600), top_k=top_k)
    assert set(drawn.token.tolist()) == {1, 2, 5}
    torch.testing.assert_close(drawn.probability, torch.full((600,), 1 / 3))
    top_k.fill_(5)
    assert set(row_sample(logits, **keys(600), top_k=top_k).token.tolist()) == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("vocab", [50, 3 * TILE])
def test_greedy_rows_ignore_filters(vocab: int) -> None:
    logits = torch.randn(8, vocab)
    drawn = row_sample(logits, **keys(8), temperature=torch.zeros(8), **random_filters(8))
    p, token = logits.double().softmax(dim=-1).max(dim=-1)
    assert torch.equal(drawn.token, token.int())
    torch.testing.assert_close(drawn.probability, p.float())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool], ids=str)
def test_rows_that_are_not_needed(dtype: torch.dtype) -> None:
    """They come back as -1 and change nothing else, alone in a program or beside needed rows."""
    logits = torch.randn(5, TILE)[:, :37]
    for block in (logits, torch.randn(5, TILE)):
        needed = torch.tensor([0, 1, 0, 0, 1]).to(dtype)
        drawn = keys(5)
        everything = row_sample(block, **drawn)
        ours = row_sample(block.where(needed[:, None] != 0, torch.nan), **drawn, needed=needed)
        kept = needed != 0
        assert torch.equal(ours.token, everything.token.where(kept, -1))
        assert torch.equal(ours.probability, everything.probability.where(kept, 0.0))
        none = row_sample(block, **drawn, needed=torch.zeros_like(needed))
        assert (none.token == -1).all() and (none.probability == 0).all()


def test_a_row_without_tokens() -> None:
    logits = torch.full((2, 9), -torch.inf)
    logits[1, 4] = 0.0
    drawn = row_sample(logits, **keys(2))
    assert drawn.token.tolist() == [-1, 4] and drawn.probability.tolist() == [0, 1]


def test_a_draw_depends_on_its_own_row_alone() -> None:
    logits, drawn = torch.randn(40, 23), keys(40)
    together = row_sample(logits, **drawn)
    order = torch.randperm(40)[:17]
    apart = row_sample(logits[order], **{name: key[order] for name, key in drawn.items()})
    assert torch.equal(apart.token, together.token[order])


DRAWS = 100_000
VOCAB = 16


@pytest.mark.parametrize("filtered", [False, True])
def test_distribution_by_chi_square(filtered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e5 draws at consecutive positions of one seed; rare tokens down to 1e-4 are in the test."""
    monkeypatch.setattr(module, "TILE", 2**17)  # the interpreter is slow per program, not per row
    logits = torch.linspace(0, -9, VOCAB)[torch.randperm(VOCAB)].half()
    options: dict[str, Tensor] = {"temperature": torch.full((DRAWS,), 0.8)}
    if filtered:
        options["top_p"] = torch.full((DRAWS,), 0.99)
        options["min_p"] = torch.full((DRAWS,), 0.005)
    drawn = row_sample(
        logits.expand(DRAWS, VOCAB),
        seed=torch.full((DRAWS,), 1234),
        position=torch.arange(DRAWS),
        step=torch.zeros(DRAWS, dtype=torch.int32),
        **options,
    )
    one_row = {name: option[:1] for name, option in options.items()}
    p = filtered_probabilities_reference(logits[None], **one_row)[0]
    counts = drawn.token.long().bincount(minlength=VOCAB)
    assert (counts[p == 0] == 0).all()
    expected = p * DRAWS
    common = expected >= 5  # the usual validity bound; rarer tokens are pooled into one cell
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    pooled = torch.cat([expected[common], expected[~common].sum()[None]])
    tested = pooled > 0
    assert tested.sum() >= 5
    assert chisquare(observed[tested].numpy(), pooled[tested].numpy()).pvalue > 1e-3


def test_wrong_arguments_are_named() -> None:
    logits = torch.zeros(3, 8)
    bad = {
        "logits": logits.long(),
        "seed": torch.zeros(3, dtype=torch.int32),
        "position": torch.zeros(2, dtype=torch.int64),
        "step": torch.zeros(3, dtype=torch.int64),
        "top_k": torch.ones(3),
        "top_p": torch.ones(4),
        "min_p": torch.ones(3, dtype=torch.float64),
    }
    for argument, wrong in bad.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            row_sample(**{"logits": logits, **keys(3), argument: wrong})
