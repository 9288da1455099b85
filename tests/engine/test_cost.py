# SPDX-License-Identifier: Apache-2.0
"""What forwards are expected to take, by those that were run."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nbdiff.engine.cost import CostModel

COUNTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def seen(seconds: Callable[[int], float], *counts: int, turns: int = 20) -> CostModel:
    """One that saw so many forwards of each of these counts of rows."""
    cost = CostModel()
    for _ in range(turns):
        for rows in counts:
            cost.observe(rows, seconds(rows))
    return cost


def test_the_first_forward_says_what_it_takes() -> None:
    """Of others it says that they differ less than their rows do."""
    cost = seen(lambda rows: 4e-3, 16, turns=1)
    assert cost.seconds(16) == pytest.approx(4e-3, rel=0.01)
    assert 4e-3 < cost.seconds(64) < 16e-3 and 0.25e-3 < cost.seconds(1) < 4e-3


@pytest.mark.parametrize("counts", [(4, 64), (16, 200), (1, 16, 100)])
def test_forwards_of_two_counts_say_what_others_take(counts: tuple[int, ...]) -> None:
    """A forward reads weights, whatever its rows, and computes each row."""

    def seconds(rows: int) -> float:
        return 0.1 + 4e-3 * rows

    cost = seen(seconds, *counts)
    for rows in (1, 30, 100, 300, 1000, 2000, 4000):
        assert cost.seconds(rows) == pytest.approx(seconds(rows), rel=0.12), rows


def test_what_is_no_line_is_learned() -> None:
    """Of a forward that takes as long with one row as with 256."""

    def seconds(rows: int) -> float:
        return 6e-3 * max(1, rows / 256)

    cost = seen(seconds, *COUNTS, turns=200)
    for rows in COUNTS:
        assert cost.seconds(rows) == pytest.approx(seconds(rows), rel=0.2), rows


@pytest.mark.parametrize("held_up", [16, 64, 256])
def test_a_first_forward_that_was_held_up_is_soon_forgotten(held_up: int) -> None:
    """By a page fault, or by others on the machine."""
    cost = CostModel()
    for turn in range(10):
        for rows in (16, 64, 256):
            cost.observe(rows, 5e-5 * rows * (3 if rows == held_up and not turn else 1))
    for rows in (16, 64, 256):
        assert cost.seconds(rows) == pytest.approx(5e-5 * rows, rel=0.2)


def test_forwards_that_are_held_up_say_little() -> None:
    """One of ten takes ten times as long."""
    cost, random = CostModel(), np.random.default_rng(0)
    for turn in range(600):
        rows = (8, 64, 256)[turn % 3]
        late = 10 if random.random() < 0.1 else 1
        cost.observe(rows, late * (2e-3 + 2e-5 * rows) * random.lognormal(0, 0.1))
    for rows in (8, 64, 256):
        assert cost.seconds(rows) == pytest.approx(2e-3 + 2e-5 * rows, rel=0.3)


def test_a_busy_machine_slows_all_forwards() -> None:
    """Soon, though only those of one count of rows are run."""
    cost = seen(lambda rows: 2e-3 + 2e-5 * rows, 8, 64, 256)
    before = {rows: cost.seconds(rows) for rows in COUNTS}
    for _ in range(30):
        cost.observe(64, 3 * (2e-3 + 2e-5 * 64))
    for rows in COUNTS:
        assert cost.seconds(rows) == pytest.approx(3 * before[rows], rel=0.25), rows


def test_cost_follows_what_forwards_take() -> None:
    cost = seen(lambda rows: 1e-3 + 1e-5 * rows, *COUNTS)
    assert cost.seconds(300) == pytest.approx(4e-3, rel=0.05)
    for _ in range(300):
        for rows in (8, 64, 512, 1024):
            cost.observe(rows, 3e-3 + 2e-5 * rows)
    for rows in (8, 64, 512):
        assert cost.seconds(rows) == pytest.approx(3e-3 + 2e-5 * rows, rel=0.1)


@given(
    forwards=st.lists(
        st.tuples(st.integers(0, 5000), st.sampled_from([0.0, 1e-9, 1e-4, 1e-2, 1.0, 1e3])),
        max_size=60,
    )
)
def test_more_rows_never_take_less(forwards: list[tuple[int, float]]) -> None:
    """Whatever is seen."""
    cost = CostModel()
    for rows, seconds in forwards:
        cost.observe(rows, seconds)
        found = [cost.seconds(count) for count in range(0, 6000, 37)]
        assert found[0] > 0 and np.isfinite(found).all() and sorted(found) == found


@pytest.mark.parametrize("rows", [2048, 3072, 4096, 16384])
def test_more_rows_than_any_count(rows: int) -> None:
    """Batches of prompts on a GPU, or many canvases."""
    cost = seen(lambda rows: 2e-3 + 1e-5 * rows, 64, rows, turns=100)
    for count in (64, rows, 2 * rows):
        assert cost.seconds(count) == pytest.approx(2e-3 + 1e-5 * count, rel=0.1)


def test_noise_at_one_count_changes_no_other() -> None:
    """For thousands of forwards."""
    cost, random = seen(lambda rows: 1e-2 + 1e-3 * rows, *COUNTS), np.random.default_rng(0)
    for _ in range(20_000):
        cost.observe(64, (1e-2 + 1e-3 * 64) * random.lognormal(0, 0.2))
    for rows in COUNTS:
        assert cost.seconds(rows) == pytest.approx(1e-2 + 1e-3 * rows, rel=0.35), rows


def test_a_first_forward_that_took_a_day() -> None:
    cost = CostModel()
    cost.observe(64, 86_400.0)
    for _ in range(300):
        cost.observe(64, 1e-3)
        cost.observe(8, 5e-4)
        assert np.isfinite(cost.doubt(512))
    assert cost.seconds(64) == pytest.approx(1e-3, rel=0.3)
