# SPDX-License-Identifier: Apache-2.0
"""What forwards are expected to take, by those that were run."""

import pytest

from vllm_nbdiff.engine.cost import CostModel


def test_the_first_forwards_say_what_they_take() -> None:
    """Before others were seen, dearer ones and cheaper ones are expected to differ less."""
    cost = CostModel()
    cost.observe(16, 4e-3)
    assert cost.seconds(16) == pytest.approx(4e-3)
    assert 4e-3 < cost.seconds(64) < 16e-3 and 0.25e-3 < cost.seconds(1) < 4e-3
    cost.observe(64, 20e-3)
    assert cost.seconds(64) == pytest.approx(20e-3, rel=0.05)
    # Between them by a power law; above as much a row, but no less a row than there.
    assert cost.seconds(32) == pytest.approx((4e-3 * 20e-3) ** 0.5, rel=0.05)
    assert cost.seconds(256) == pytest.approx(4 * 20e-3, rel=0.05)
    assert cost.seconds(1) == pytest.approx(1e-3, rel=0.05)


def test_more_rows_than_were_seen_cost_what_the_last_ones_did() -> None:
    """A forward reads weights, whatever its rows, and computes each row."""
    cost = CostModel()
    for rows in (32, 64, 128):
        cost.observe(rows, 0.1 + 4e-3 * rows)
    assert cost.seconds(1024) == pytest.approx(0.1 + 4e-3 * 1024, rel=0.05)


@pytest.mark.parametrize("held_up", [16, 64, 256])
def test_a_first_forward_that_was_held_up_is_soon_forgotten(held_up: int) -> None:
    """By a page fault, or by others on the machine."""
    cost = CostModel()
    for turn in range(10):
        for rows in (16, 64, 256):
            cost.observe(rows, 5e-5 * rows * (3 if rows == held_up and not turn else 1))
    for rows in (16, 64, 256):
        assert cost.seconds(rows) == pytest.approx(5e-5 * rows, rel=0.2)


@pytest.mark.parametrize("beside", [10, 20, 47, 72])
def test_a_count_is_known_after_many_beside_it(beside: int) -> None:
    """What was measured is not guessed when another count is seen for the first time."""
    cost, count = CostModel(), {10: 16, 20: 32, 47: 64, 72: 128}[beside]
    for rows in (1, beside, count):
        for _ in range(150):
            cost.observe(rows, 1e-3 + 1e-5 * rows)
    assert cost.unknown(count) is None
    before = cost.seconds(count) / cost.slowness
    cost.observe(1024, 1e-3 + 1e-5 * 1024)
    assert cost.seconds(count) / cost.slowness == pytest.approx(before)


def test_cost_follows_what_forwards_take() -> None:
    cost = CostModel()
    for rows in 20 * (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        cost.observe(rows, 1e-3 + 1e-5 * rows)
    assert cost.seconds(300) == pytest.approx(4e-3, rel=0.05)
    for _ in range(300):
        for rows in (8, 64, 512, 1024):
            cost.observe(rows, 3e-3 + 2e-5 * rows)
    for rows in (8, 64, 512):
        assert cost.seconds(rows) == pytest.approx(3e-3 + 2e-5 * rows, rel=0.1)
