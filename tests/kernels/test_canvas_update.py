# SPDX-License-Identifier: Apache-2.0
"""Canvas updates against the sorting reference, and against decisions worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_nbdiff.kernels.canvas_update import (
    MAX_CANVAS_LENGTH,
    CanvasUpdate,
    SelectionRule,
    canvas_update,
    canvas_update_reference,
)

MASK, EOS, STOP = 90, 91, 92
EOS_IDS = torch.tensor([EOS, STOP], dtype=torch.int32)


def random_batch(num_requests: int, length: int, sub_block_length: int) -> dict[str, Any]:
    """Canvases of every degree of completion, every rule, scores with ties."""
    canvas = torch.randint(85, 95, (num_requests, length), dtype=torch.int32)
    is_masked = torch.rand(num_requests, length) < torch.rand(num_requests, 1) * 1.5
    is_masked[::7] = False
    p = (torch.rand(num_requests, length) * 16).round() / 16
    return {
        "canvas": canvas.where(~is_masked, MASK).where(is_masked | (canvas != MASK), 3),
        "token": torch.randint(85, 95, (num_requests, length), dtype=torch.int32),
        "probability": p,
        "score": (p * 4).round(),
        "entropy": (torch.rand(num_requests, length) * 16).round() / 16,
        "rule": torch.randint(0, len(SelectionRule), (num_requests,), dtype=torch.int32),
        "parameter": torch.rand(num_requests) * 1.5,
        "sub_block_length": torch.full((num_requests,), sub_block_length, dtype=torch.int32),
    }


def update_both(batch: dict[str, Any]) -> tuple[Tensor, CanvasUpdate]:
    expected_canvas = batch["canvas"].clone()
    options = {"mask_token_id": MASK, "eos_token_ids": EOS_IDS}
    expected = canvas_update_reference(**{**batch, "canvas": expected_canvas}, **options)
    result = canvas_update(**batch, **options)
    assert torch.equal(batch["canvas"], expected_canvas)
    for name, ours, theirs in zip(result._fields, result, expected, strict=True):
        assert torch.equal(ours, theirs), name
    return batch["canvas"], result


# Probabilities, scores and entropies are multiples of 1/16: sums are exact and ties are ties.
@pytest.mark.parametrize(
    ("num_requests", "length", "sub_block_length"),
    [(1, 1, 1), (1, 32, 8), (40, 32, 8), (40, 32, 32), (40, 13, 5), (257, 8, 4), (3, 256, 32)],
)
def test_matches_the_reference(num_requests: int, length: int, sub_block_length: int) -> None:
    update_both(random_batch(num_requests, length, sub_block_length))


def test_inactive_canvases_are_left_alone() -> None:
    batch = random_batch(20, 16, 8)
    before = batch["canvas"].clone()
    batch["active"] = torch.arange(20) % 2 == 0
    after, result = update_both(batch)
    assert torch.equal(after[1::2], before[1::2])
    assert not result.accepted[1::2].any() and result.accepted[::2].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_quota_reaches_into_the_following_sub_blocks(dtype: torch.dtype) -> None:
    batch = random_batch(60, 24, 4)
    batch["canvas"] = batch["canvas"].to(dtype)
    before = batch["canvas"] == MASK
    batch["quota"] = torch.randint(1, 12, (60,), dtype=torch.int32)
    _, result = update_both(batch)
    expected = torch.minimum(batch["quota"], before.sum(1))
    assert (result.accepted.sum(1) >= expected).all()
    assert (result.accepted.sum(1) > 4).any()


def test_slots_and_compact_columns() -> None:
    """The same decisions when requests name their canvas and give only candidate columns."""
    batch = random_batch(30, 16, 4)
    slot = torch.randperm(30)[:11]
    masked = batch["canvas"][slot] == MASK
    first = masked.int().argmax(1)
    column = (first[:, None] + torch.arange(4)).clamp(max=15)
    for name in ("token", "probability", "score", "entropy"):
        batch[name] = batch[name][slot]
    whole = {**batch, "canvas": batch["canvas"].clone(), "slot": slot}
    for name in ("token", "probability", "score", "entropy"):
        batch[name] = batch[name].gather(1, column)
    canvas, _ = update_both({**batch, "slot": slot, "compact": True})
    assert torch.equal(canvas, update_both(whole)[0])


def test_rows_may_be_strided() -> None:
    batch = random_batch(9, 16, 8)
    for name in ("token", "probability", "score", "entropy"):
        batch[name] = batch[name].repeat(1, 2)[:, :16]
    update_both(batch)


def test_every_mask_is_filled_in_the_end() -> None:
    batch = random_batch(9, 8, 4)
    batch["token"] = batch["token"].where(batch["token"] != MASK, 3)
    for _ in range(8):
        _, result = update_both(batch)
    assert result.finished.all() and (result.num_masked == 0).all()


def decide(
    canvas: list[int],
    p: list[float],
    rule: SelectionRule,
    parameter: float,
    sub_block_length: int = 4,
    entropy: list[float] | None = None,
) -> tuple[list[int], CanvasUpdate]:
    """One request; the proposal for position i is the token i."""
    row = torch.tensor([canvas], dtype=torch.int32)
    result = canvas_update(
        row,
        torch.arange(len(canvas), dtype=torch.int32)[None],
        torch.tensor([p]),
        torch.tensor([p]),
        torch.tensor([entropy or [0.0] * len(canvas)]),
        mask_token_id=MASK,
        eos_token_ids=EOS_IDS,
        rule=torch.tensor([rule], dtype=torch.int32),
        parameter=torch.tensor([parameter]),
        sub_block_length=torch.tensor([sub_block_length], dtype=torch.int32),
    )
    return row[0].tolist(), result


M = MASK


def test_threshold_is_strict_and_stays_in_the_sub_block() -> None:
    row, result = decide(
        [7, M, M, M, M, M], [1, 0.5, 0.9, 0.95, 1, 1], SelectionRule.THRESHOLD, 0.9
    )
    assert row == [7, M, M, 3, M, M]
    assert result.num_masked.item() == 4 and not result.finished.item()


def test_the_best_is_filled_however_unlikely() -> None:
    strictest = {
        SelectionRule.THRESHOLD: 1.0,
        SelectionRule.FACTOR: 0.0,
        SelectionRule.ENTROPY_BOUND: 0.0,
        SelectionRule.ENTROPY_THRESHOLD: 0.0,
    }
    for rule, parameter in strictest.items():
        entropy = [0.0, 4.0, 3.0, 4.0]
        row, _ = decide([7, M, M, M], [1.0, 0.01, 0.02, 0.01], rule, parameter, entropy=entropy)
        assert row == [7, M, 2, M]


def test_factor_stops_where_the_bound_breaks() -> None:
    """n = 1: 2 * 0.05 < 1; n = 2: 3 * 0.3 < 1; n = 3: 4 * 0.3 >= 1."""
    row, _ = decide([M, M, M, 7], [0.7, 0.95, 0.7, 1], SelectionRule.FACTOR, 1.0)
    assert row == [0, 1, M, 7]


def test_factor_does_not_fill_a_last_candidate_that_fails() -> None:
    """The off-by-one of the published code, which commits it too."""
    row, _ = decide([M, M, 7, 7], [0.99, 0.1, 1, 1], SelectionRule.FACTOR, 1.0)
    assert row == [0, M, 7, 7]


def test_entropy_bound_leaves_the_largest_entropy_out_of_the_sum() -> None:
    entropy = [0.125, 0.25, 0.5, 4.0]
    row, _ = decide([M] * 4, [0.9, 0.8, 0.7, 0.1], SelectionRule.ENTROPY_BOUND, 0.375, 4, entropy)
    assert row == [0, 1, 2, M]


def test_entropy_threshold_takes_the_bound_itself() -> None:
    entropy = [0.25, 0.5, 0.25, 4.0]
    row, result = decide(
        [M] * 4, [0.9, 0.8, 0.7, 0.1], SelectionRule.ENTROPY_THRESHOLD, 0.25, 4, entropy
    )
    assert row == [0, M, 2, M]
    assert result.num_filled.item() == 2


def test_ended_needs_an_eos_with_no_mask_before_it() -> None:
    for canvas, ended in (
        ([7, EOS, M, M], True),
        ([7, STOP, 7, 7], True),
        ([M, M, EOS, 7], False),
        ([7, 7, 7, 7], False),
    ):
        _, result = decide(canvas, [0.5] * 4, SelectionRule.THRESHOLD, 1.0)
        assert result.ended.item() is ended


def test_wrong_arguments_are_named() -> None:
    good = random_batch(4, 8, 4)
    bad = {
        "canvas": torch.zeros(4, MAX_CANVAS_LENGTH + 1, dtype=torch.int32),
        "token": good["token"].long(),
        "probability": good["probability"].half(),
        "score": good["score"][:3],
        "entropy": good["entropy"][:, :7],
        "rule": good["rule"] + 4,
        "parameter": good["parameter"].double(),
        "sub_block_length": good["sub_block_length"] - 4,
        "active": torch.ones(3, dtype=torch.int32),
        "slot": torch.tensor([0, 1, 2, 4]),
        "quota": torch.ones(4),
        "eos_token_ids": EOS_IDS.long(),
    }
    for argument, wrong in bad.items():
        call = {**good, "eos_token_ids": EOS_IDS, argument: wrong}
        with pytest.raises(ValueError, match=f"^{argument}: "):
            canvas_update(**call, mask_token_id=MASK)
