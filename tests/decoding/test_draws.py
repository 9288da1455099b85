# SPDX-License-Identifier: Apache-2.0
"""Draws by Triton's kernels, interpreted, against those by PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.interpreter import interpret_kernels
from vllm_nbdiff.decoding import draws
from vllm_nbdiff.decoding.draws import draw_rows
from vllm_nbdiff.decoding.rules import CONFIDENCE, ENTROPY, MARGIN
from vllm_nbdiff.decoding.sampling import Asked, Drawn, RowParams, sample

ROWS, VOCAB, MASK = 24, 120, 3


@pytest.fixture(params=[False, True], ids=["pytorch", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether `draw_rows` takes Triton's kernels."""
    if request.param:
        interpret_kernels()
        monkeypatch.setattr(draws, "has_kernels", lambda logits: True)
    return request.param


def mixed(sampled: bool | None, filters: bool, scores: bool) -> RowParams:
    """Parameters of ROWS rows; `sampled` None: every other row."""
    torch.manual_seed(3)
    temperature = torch.rand(ROWS) + 0.3
    if sampled is None:
        temperature[::2] = 0
    elif not sampled:
        temperature[:] = 0
    off = torch.rand(3, ROWS) < (0.4 if filters else 2)
    columns = {
        "temperature": temperature,
        "top_p": torch.rand(ROWS).clamp(min=0.05).masked_fill(off[0], 1),
        "top_k": torch.randint(1, 40, (ROWS,)).masked_fill(off[1], VOCAB),
        "min_p": (torch.rand(ROWS) * 0.1).masked_fill(off[2], 0),
        "algorithm": torch.randint(0, 3 if scores else 1, (ROWS,)),
    }
    asked = Asked.by(**{name: c.numpy() for name, c in columns.items()}, vocab_size=VOCAB)
    return RowParams(**columns, draw=torch.rand(ROWS, dtype=torch.float64), asked=asked)


def assert_same(ours: Drawn, expected: Drawn) -> None:
    assert ours.token.dtype == torch.int64
    assert torch.equal(ours.token, expected.token)
    torch.testing.assert_close(ours.probability, expected.probability, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.confidence, expected.confidence, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("sampled", [False, True, None])
def test_every_device_draws_the_same(
    sampled: bool | None, filters: bool, dtype: torch.dtype, kernels: bool
) -> None:
    logits = (torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    logits[::3, MASK] = 30  # greedy rows may name it
    logits[5], logits[6, 2], logits[7, 2] = -torch.inf, torch.nan, torch.inf
    for scores in (False, True):
        asked = mixed(sampled, filters, scores)
        expected = sample(logits, asked, MASK)
        assert_same(draw_rows(logits, asked, MASK), expected)
        assert_same(draw_rows(logits, replace(asked, asked=Asked()), MASK), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_without_probabilities(dtype: torch.dtype) -> None:
    """The same, ties and rows that mean nothing among them."""
    logits = torch.randint(0, 5, (ROWS, VOCAB), generator=torch.Generator().manual_seed(1)).to(
        dtype
    )
    logits[5], logits[6, 2], logits[7, 2] = -torch.inf, torch.nan, torch.inf
    for needed in (None, torch.arange(ROWS) % 3 > 0):
        expected = draw_rows(logits, None, MASK, needed)
        drawn = draw_rows(logits, None, MASK, needed, chances=False)
        assert torch.equal(drawn.token, expected.token)
        assert torch.equal(drawn.probability, (expected.probability > 0).float())


def test_rows_that_are_not_needed(kernels: bool) -> None:
    """They are not read and come back as token -1."""
    logits, asked = torch.randn(ROWS, VOCAB), mixed(None, True, True)
    needed = torch.rand(ROWS) < 0.5
    expected = draw_rows(logits, asked, MASK)
    logits[~needed] = torch.nan
    drawn = draw_rows(logits, asked, MASK, needed)
    assert_same(Drawn(*(c[needed] for c in drawn)), Drawn(*(c[needed] for c in expected)))
    assert (drawn.token[~needed] == -1).all() and (drawn.probability[~needed] == 0).all()


def test_asked_by_columns() -> None:
    def asked(**columns: list[float]) -> Asked:
        off = {"temperature": 0, "top_p": 1, "top_k": VOCAB, "min_p": 0, "algorithm": CONFIDENCE}
        filled = {name: np.array(columns.get(name, [value] * 2)) for name, value in off.items()}
        return Asked.by(**filled, vocab_size=VOCAB)

    assert asked() == Asked(greedy=True, sampled=False, filters=False, scores=False)
    assert asked(temperature=[0, 1])[:4] == (True, True, False, False)
    scored = asked(temperature=[0.5, 1], algorithm=[CONFIDENCE, ENTROPY])
    assert scored[:4] == (False, True, False, True)
    assert asked(top_p=[0.5, 1], algorithm=[MARGIN, CONFIDENCE])[:4] == (True, False, False, True)
    for one in ({"top_p": [1, 0.5]}, {"top_k": [9, 5]}, {"min_p": [0, 0.1]}):
        assert asked(temperature=[0, 1], **one)[:4] == (True, True, True, False)
        assert asked(temperature=[1, 0], **one).filters == ("top_k" in one)
