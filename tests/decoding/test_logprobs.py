# SPDX-License-Identifier: Apache-2.0
"""Scores of tokens against log-softmax and against the reference's own distributions."""

import math

import torch

from vllm_nbdiff.decoding.logprobs import process, score
from vllm_nbdiff.decoding.rules import CONFIDENCE
from vllm_nbdiff.decoding.sampling import RowParams
from vllm_nbdiff.reference import Sampling

VOCAB, MASK = 97, 5


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(1)) * 4


def test_score() -> None:
    logits, token = rows(6), torch.tensor([0, 5, 17, 96, 3, 3])
    exact = logits.double().log_softmax(1)
    found = score(logits, token, 4)
    assert found.token[:, 0].tolist() == token.tolist()
    assert torch.equal(found.token[:, 1:], exact.topk(4).indices)
    torch.testing.assert_close(
        found.value.double(), exact.gather(1, found.token), atol=4e-6, rtol=0
    )
    better = (exact > exact.gather(1, token[:, None])).sum(1)
    assert (found.rank - 1).tolist() == better.tolist()
    plain = score(logits, token, 0, normalized=False)
    assert torch.equal(plain.value, logits.gather(1, token[:, None]))


def test_named_tokens_take_the_place_of_the_likeliest() -> None:
    """Of the rows that name some; more may be named than there are."""
    logits, token = rows(2), torch.tensor([7, 8])
    named = torch.full((2, VOCAB + 3), -1)
    named[1, :3] = torch.tensor([4, 4, 90])
    found = score(logits, token, VOCAB + 3, named=named)
    assert found.token[1, :4].tolist() == [8, 4, 4, 90]
    assert torch.equal(found.token[0, 1 : VOCAB + 1], logits[0].sort(descending=True).indices)
    torch.testing.assert_close(found.value, logits.log_softmax(1).gather(1, found.token))


def test_process_gives_what_rows_are_drawn_from() -> None:
    logits = rows(5)
    filters = [(0.0, 1.0, VOCAB), (0.7, 1.0, VOCAB), (0.7, 1.0, 3), (1.3, 0.6, VOCAB), (1, 0.8, 9)]
    temperature, top_p, top_k = map(torch.tensor, zip(*filters, strict=True))
    params = RowParams(
        temperature=temperature.float(),
        top_p=top_p.float(),
        top_k=top_k,
        min_p=torch.zeros(5),
        algorithm=torch.full((5,), CONFIDENCE),
        draw=torch.zeros(5, dtype=torch.float64),
    )
    found = process(logits, params, MASK).softmax(1)
    for row, (t, p, k), own in zip(logits, filters, found, strict=True):
        sampling = Sampling(MASK, t, p if p < 1 else None, k if k < VOCAB else None)
        torch.testing.assert_close(own, sampling.probabilities(row), atol=1e-6, rtol=1e-5)
    assert torch.equal(process(logits, None, MASK), logits)
    assert math.isclose(float(found.sum()), 5, rel_tol=1e-5)
