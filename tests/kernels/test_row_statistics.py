# SPDX-License-Identifier: Apache-2.0
"""Row statistics against their fp64 reference, in the interpreter."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_nbdiff.kernels import logits as module
from vllm_nbdiff.kernels.logits import TILE
from vllm_nbdiff.kernels.row_statistics import (
    RowStatistics,
    row_statistics,
    row_statistics_reference,
)

from tests.interpreter import recorded_launches
from tests.kernels.conftest import DEVICE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps


def assert_as_good_as_fp32(logits: Tensor, **options: Any) -> RowStatistics:
    """Tokens are equal; each error against fp64 is at most twice that of eager fp32, or what a few
    roundings of the result itself amount to (eager fp32 may hit the exact value by luck).
    """
    ours = row_statistics(logits, **options)
    exact = row_statistics_reference(logits, **options)
    eager = row_statistics_reference(logits, compute_dtype=torch.float32, **options)
    assert torch.equal(ours.token, exact.token)
    for name in ours._fields[1:]:
        result, truth = getattr(ours, name), getattr(exact, name)
        roundings = 4 * EPS * truth.abs().clamp(min=1)
        bound = 2 * (getattr(eager, name) - truth).abs().max() + roundings
        assert result.dtype == torch.float32
        assert ((result - truth).abs() <= bound).all(), name
    return ours


def random_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """From flat to peaked rows."""
    return (torch.randn(rows, vocab) * torch.linspace(0.5, 6, rows)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 1021, TILE, TILE + 1, 20011])
def test_vocabulary_sizes(vocab: int, dtype: torch.dtype) -> None:
    assert_as_good_as_fp32(random_logits(3, vocab, dtype))


@pytest.mark.parametrize("rows", [1, 2, 257])
def test_row_counts(rows: int) -> None:
    assert_as_good_as_fp32(random_logits(rows, 131))


@pytest.mark.parametrize("processors", [1, 2, 132])
def test_rows_cut_into_parts(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiprocessor_count", lambda device: processors)
    assert_as_good_as_fp32(random_logits(2, 5 * TILE + 17))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter's launches are recorded")
def test_one_kernel_serves_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is compiled while others wait because a batch has one row more."""
    monkeypatch.setattr(module, "multiprocessor_count", lambda device: 4)
    with recorded_launches() as found:
        for rows in (1, 2, 3, 4, 7, 16):
            logits, needed = random_logits(rows, 5 * TILE), torch.ones(rows, dtype=torch.int32)
            row_statistics(logits, needed=needed)
    assert len(found) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_and_ban(dtype: torch.dtype) -> None:
    logits = random_logits(5, 5003, dtype)
    temperature = torch.tensor([1.0, 0.0, 0.1, 2.0, 0.7])
    assert_as_good_as_fp32(logits, temperature=temperature)
    best = int(logits[2].argmax())
    assert_as_good_as_fp32(logits, banned_id=best, temperature=temperature)


def test_banned_tokens() -> None:
    """-inf in the logits or banned by id, in runs longer than a tile, up to all tokens but one."""
    logits = random_logits(4, 3 * TILE)
    logits[0, : 2 * TILE] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits[2, ::2] = -torch.inf
    banned = int(logits[3].argmax())
    ours = assert_as_good_as_fp32(logits, banned_id=banned)
    assert ours.token[3] != banned
    assert ours.token[1] == 0 and ours.probability[1] == 1 and ours.entropy[1] == 0


def test_rows_without_a_distribution() -> None:
    """NaN of either sign, +inf or nothing but -inf give token 0 and the least confidence."""
    logits = torch.randn(5, 300)
    logits[0] = -torch.inf
    logits[1, 7] = torch.nan
    logits[2, 7] = -torch.tensor(torch.nan)
    logits[3, 7] = torch.inf
    logits[4] = -torch.inf
    logits[4, 9] = 1.0
    ours = row_statistics(logits, banned_id=9)
    for row in zip(*ours, strict=True):
        assert [float(field) for field in row] == [0, 0, math.inf, 0, -math.inf]
    for field, reference in zip(ours, row_statistics_reference(logits, banned_id=9), strict=True):
        assert torch.equal(field, reference.to(field.dtype))


def test_ties_take_the_first_and_have_no_margin() -> None:
    logits = torch.zeros(4, 2 * TILE)
    logits[0, [5, 9]] = 3.0  # the same vector
    logits[1, [77, 1024 + 77]] = 3.0  # the same lane of two vectors
    logits[2, [TILE + 1, TILE - 1]] = 3.0  # two tiles
    logits[3, [TILE + 6, 6]] = 3.0  # the same lane of two tiles
    ours = assert_as_good_as_fp32(logits)
    assert ours.token.tolist() == [5, 77, TILE - 1, 6]
    assert (ours.margin == 0).all()


def test_far_apart_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e4, -3e4, 2.9e4], [-3e4, -3e4, -3e4]])
    assert_as_good_as_fp32(logits, temperature=torch.tensor([0.01, 1.0]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool], ids=str)
def test_rows_that_are_not_needed(dtype: torch.dtype) -> None:
    """They are not read (they hold NaN) and come back neutral; zero needed rows are fine."""
    logits = random_logits(6, 999)
    needed = torch.tensor([1, 0, 0, 1, 1, 0]).to(dtype)
    logits[needed == 0] = torch.nan
    ours = row_statistics(logits, needed=needed)
    kept = needed != 0
    for field, expected in zip(ours, row_statistics(logits[kept]), strict=True):
        assert torch.equal(field[kept], expected)
    assert (ours.token[~kept] == -1).all()
    assert all((field[~kept] == 0).all() for field in ours[1:])
    none = row_statistics(logits, needed=torch.zeros_like(needed))
    assert (none.token == -1).all() and (none.lse == 0).all()


def test_strided_rows_and_no_rows() -> None:
    wide = random_logits(4, 1500)
    assert_as_good_as_fp32(wide[:, :1013])
    assert row_statistics(wide[:0]).token.shape == (0,)


def test_wrong_arguments_are_named() -> None:
    logits = torch.zeros(3, 8)
    bad = {
        "logits": logits.double(),
        "temperature": torch.ones(2),
        "banned_id": -1,
        "needed": torch.ones(3),
    }
    for argument, wrong in bad.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            row_statistics(**{"logits": logits, argument: wrong})
    with pytest.raises(ValueError, match=r"^logits: .*contiguous"):
        row_statistics(torch.zeros(8, 3).T)
