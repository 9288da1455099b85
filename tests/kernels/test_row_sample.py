# SPDX-License-Identifier: Apache-2.0
"""Draws against the sorting fp64 reference, and against the distribution they claim to follow."""

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from vllm_nbdiff.kernels import logits as logits_module
from vllm_nbdiff.kernels import row_sample as module
from vllm_nbdiff.kernels.logit_filter import filtered_probabilities_reference
from vllm_nbdiff.kernels.logits import TILE
from vllm_nbdiff.kernels.row_sample import row_sample, row_sample_reference
from vllm_nbdiff.kernels.uniform import uniform

from tests.interpreter import recorded_launches
from tests.kernels.conftest import DEVICE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps


def draws(rows: int) -> Tensor:
    return torch.rand(rows, dtype=torch.float64)


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
    error of it; statistics agree to that error.

    A weight 2^d carries the rounding of d, |d| eps, on top of a few eps of its own.
    """
    draw = draws(len(logits))
    ours = row_sample(logits, draw=draw, **options)
    exact = row_sample_reference(logits, draw=draw, **options)
    temperature = options.get("temperature")
    spread = logits.float().nan_to_num(neginf=0).abs().amax(dim=1) * 2 + 8
    if temperature is not None:
        spread = spread / temperature
    tolerance = 4 * EPS * spread
    same = ours.token == exact.token
    assert ((ours.probability - exact.probability).abs() <= tolerance)[same].all()
    assert ((ours.margin - exact.margin).abs() <= tolerance).all()
    assert ((ours.entropy - exact.entropy).abs() <= tolerance * (1 + exact.entropy)).all()
    p = filtered_probabilities_reference(logits, **options)
    for row in (~same).nonzero()[:, 0].tolist():
        step = p[row].cumsum(dim=0)[min(ours.token[row], exact.token[row])]
        assert abs(step - draw[row]) <= tolerance[row]
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


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("processors", [1, 10, 10_000], ids=["whole rows", "two tiles", "tiles"])
def test_rows_cut_into_parts(
    processors: int, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (module, logits_module):
        monkeypatch.setattr(place, "TILE", 32)
    monkeypatch.setattr(logits_module, "multiprocessor_count", lambda device: processors)
    rows = 10
    logits = (torch.randn(rows, 32 * 6 + 5) * torch.linspace(0.1, 5, rows)[:, None]).bfloat16()
    logits[::5, 32:96] = -torch.inf
    logits[1::5, -40:] = logits[1::5].amax(1, keepdim=True)
    logits[2::5, [3, -1]] = logits[2::5].amax(1, keepdim=True) + 1  # a tie of two parts
    assert_draws_match(logits, banned_id=7, **(random_filters(rows) if filtered else {}))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter's launches are recorded")
def test_one_kernel_serves_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is compiled while others wait because a batch has one row more."""
    monkeypatch.setattr(logits_module, "multiprocessor_count", lambda device: 4)
    with recorded_launches() as found:
        for rows in (1, 2, 3, 4, 7, 16):
            logits, needed = torch.randn(rows, 5 * TILE), torch.ones(rows, dtype=torch.int32)
            row_sample(logits, draw=draws(rows), needed=needed, top_p=torch.ones(rows))
    assert len(found) == 3


def test_draws_with_everything() -> None:
    temperature = torch.rand(400) * 2 + 0.05
    logits = (torch.randn(400, 61) * 3).bfloat16()
    logits[:, ::4] = -torch.inf
    assert_draws_match(logits, temperature=temperature, banned_id=5, **random_filters(400))


def support(logits: Tensor, **filters: float) -> set[int]:
    """Tokens that one row gives, each with the same probability."""
    n = 12
    draw = torch.arange(n, dtype=torch.float64).add(0.5).div(n)
    dtypes = {"top_k": torch.int32}
    columns = {name: torch.full((n,), v, dtype=dtypes.get(name)) for name, v in filters.items()}
    drawn = row_sample(logits.repeat(n, 1), draw=draw, **columns)
    tokens = set(drawn.token.tolist())
    torch.testing.assert_close(drawn.probability, torch.full((n,), 1 / len(tokens)))
    return tokens


def test_ties() -> None:
    """top_k keeps all that equal the k-th; top_p as many as its mass asks for, the first ones."""
    logits = torch.tensor([[1.0, 2.0, 2.0, -9.0, 2.0, 2.0]])
    assert support(logits, top_k=2) == {1, 2, 4, 5}
    assert support(logits, top_p=0.6) == {1, 2, 4}
    assert support(logits, top_p=0.3) == {1, 2}
    assert support(logits, top_p=0.1) == {1}
    zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    assert support(zeros, top_k=1) == {0, 1, 2, 3}
    assert support(zeros, top_p=0.5) == {0, 1}


def test_ties_over_several_tiles() -> None:
    logits = torch.full((1, 2 * TILE + 5), -30.0, dtype=torch.bfloat16)
    logits[0, [7, TILE + 1, TILE + 2, 2 * TILE + 3]] = 1.0
    assert support(logits, top_p=0.7) == {7, TILE + 1, TILE + 2}


def test_each_filter_judges_what_the_one_before_it_left() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    one = torch.ones(1)
    for filters, expected in (
        ({"top_k": 2 * one.int(), "top_p": 0.55 * one}, [1.0, 0, 0, 0]),  # 0.4 / 0.7 > 0.55
        ({"top_k": 3 * one.int(), "top_p": 0.8 * one}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"min_p": 0.7 * one, "top_p": 0.55 * one}, [1.0, 0, 0, 0]),
        ({"top_p": 0.55 * one}, [4 / 7, 3 / 7, 0, 0]),
    ):
        reference = filtered_probabilities_reference(p.log()[None], **filters)[0]
        torch.testing.assert_close(reference.float(), torch.tensor(expected))
        for draw in (0.0, 0.5, 0.999):
            options = {"draw": torch.tensor([draw], dtype=torch.float64), **filters}
            drawn = row_sample(p.log()[None], **options)
            torch.testing.assert_close(drawn.probability[0], torch.tensor(expected)[drawn.token[0]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool], ids=str)
def test_rows_that_are_not_needed(dtype: torch.dtype) -> None:
    """They come back as -1 and change nothing else, alone in a program or beside needed rows."""
    logits = torch.randn(5, TILE)[:, :37]
    for block in (logits, torch.randn(5, TILE)):
        needed = torch.tensor([0, 1, 0, 0, 1]).to(dtype)
        draw = draws(5)
        everything = row_sample(block, draw=draw)
        ours = row_sample(block.where(needed[:, None] != 0, torch.nan), draw=draw, needed=needed)
        kept = needed != 0
        assert torch.equal(ours.token, everything.token.where(kept, -1))
        for mine, all_rows in zip(ours[1:], everything[1:], strict=True):
            assert torch.equal(mine, all_rows.where(kept, 0.0))
        none = row_sample(block, draw=draw, needed=torch.zeros_like(needed))
        assert (none.token == -1).all() and all((field == 0).all() for field in none[1:])


@pytest.mark.parametrize("filtered", [False, True])
def test_rows_without_a_distribution(filtered: bool) -> None:
    """NaN of either sign, +inf or nothing but -inf give token 0 and the least confidence."""
    logits = torch.randn(6, 9)
    logits[0] = -torch.inf
    logits[1, 3] = torch.nan
    logits[2, 3] = -torch.tensor(torch.nan)
    logits[3, 3] = torch.inf
    logits[4] = -torch.inf
    logits[4, 4] = 0.0
    logits[5] = -torch.inf
    logits[5, 8] = 0.0
    filters = {"top_k": torch.full((6,), 3), "top_p": torch.full((6,), 0.9)} if filtered else {}
    drawn = row_sample(logits, draw=draws(6), banned_id=8, **filters)
    assert drawn.token.tolist() == [0, 0, 0, 0, 4, 0]
    assert drawn.probability.tolist() == [0, 0, 0, 0, 1, 0]
    assert drawn.margin.tolist() == [0, 0, 0, 0, 1, 0]
    assert drawn.entropy.tolist() == [torch.inf] * 4 + [0, torch.inf]
    expected = row_sample_reference(logits, draw=draws(6), banned_id=8, **filters)
    for field, reference in zip(drawn, expected, strict=True):
        assert torch.equal(field, reference)


def test_a_draw_depends_on_its_own_row_alone() -> None:
    logits, draw = torch.randn(40, 23), draws(40)
    together = row_sample(logits, draw=draw)
    order = torch.randperm(40)[:17]
    apart = row_sample(logits[order], draw=draw[order])
    assert torch.equal(apart.token, together.token[order])


@pytest.mark.parametrize("filtered", [False, True])
def test_the_number_of_rows_changes_no_bit(filtered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it decides into how many parts each is cut."""
    for place in (module, logits_module):
        monkeypatch.setattr(place, "TILE", 32)
    monkeypatch.setattr(logits_module, "multiprocessor_count", lambda device: 1)
    rows = 5
    logits, draw = (torch.randn(rows, 32 * 4) * 4).bfloat16(), draws(rows)
    filters = {"top_p": torch.full((rows,), 0.97)} if filtered else {}
    together = row_sample(logits, draw=draw, **filters)
    for row in range(rows):
        own = {name: values[row : row + 1] for name, values in filters.items()}
        alone = row_sample(logits[row : row + 1], draw=draw[row : row + 1], **own)
        for field, others in zip(alone, together, strict=True):
            assert torch.equal(field, others[row : row + 1])


DRAWS = 100_000
VOCAB = 16


@pytest.mark.parametrize("filtered", [False, True])
def test_distribution_by_chi_square(filtered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e5 draws at consecutive positions of one seed; rare tokens down to 1e-4 are in the test."""
    # The interpreter is slow per program, not per row.
    for place in (module, logits_module):
        monkeypatch.setattr(place, "TILE", 2**17)
    logits = torch.linspace(0, -9, VOCAB)[torch.randperm(VOCAB)].half()
    options: dict[str, Tensor] = {"temperature": torch.full((DRAWS,), 0.8)}
    if filtered:
        options["top_p"] = torch.full((DRAWS,), 0.99)
        options["min_p"] = torch.full((DRAWS,), 0.005)
    drawn = row_sample(
        logits.expand(DRAWS, VOCAB),
        draw=uniform(torch.full((DRAWS,), 1234), torch.arange(DRAWS), torch.zeros(DRAWS).long()),
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
        "draw": torch.zeros(3),
        "banned_id": 8,
        "top_k": torch.ones(3),
        "top_p": torch.ones(4),
        "min_p": torch.ones(3, dtype=torch.float64),
    }
    for argument, wrong in bad.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            row_sample(**{"logits": logits, "draw": draws(3), argument: wrong})
