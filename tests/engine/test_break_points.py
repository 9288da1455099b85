# SPDX-License-Identifier: Apache-2.0
"""What of a batch's drafts is worth its rows: break points and columns."""

import pytest

from tests.engine.auto_cases import chooser, seen
from vllm_nbdiff.engine.break_points import BreakPoints
from vllm_nbdiff.engine.chooser import ALL, NOTHING_MORE, Limits


def test_dear_rows_are_for_likely_break_points_only() -> None:
    """A draft behind one saves a forward; where rows are free all are worth it, and where a
    forward is nothing but rows none is."""
    limits = chooser(0.0).expected(16, 1, 0, fan_out=4).limits
    assert limits.chance < 0.02 and limits.survival < 0.02
    limits = chooser(1e-4).expected(16, 64, 0, fan_out=4).limits
    assert limits.chance >= 1 and limits.survival < 1
    limits = chooser(1e-5).expected(16, 1, 0, fan_out=4).limits
    assert 0 < limits.chance < 0.5 and 0 < limits.survival < 0.2


def test_who_drafts_for_no_break_point_has_no_limits() -> None:
    assert chooser(1e-4).expected(16, 64, 0).limits.survival == 0
    assert chooser(1e-4).expected(16, 64, 0).rows == 64 * 16


def test_what_is_worth_its_rows_is_known_at_any_load() -> None:
    """What rounds of few columns gave where rows are dear says nothing of whole ones."""
    chosen, limits = chooser(1e-5), Limits(1.0, 0.7)
    for _ in range(300):
        chosen.observe(seen(16, 16, 16, hit=0, rows=16, drafts=1))
    tokens = chosen.expected(16, 1, 0).tokens
    assert tokens == pytest.approx((16 + 1) / 2, rel=0.05)
    for _ in range(50):
        chosen.observe(seen(16, 4, 4, hit=0, rows=4, drafts=1, limits=limits))
    assert chosen.expected(16, 1, 0).tokens == pytest.approx(tokens, rel=0.1)


def test_drafts_for_break_points_are_believed_as_they_are_seen() -> None:
    """However many rows they take, where those hardly cost: by their hits."""
    chosen = chooser(1e-7)
    limits = chosen.expected(16, 1, 0, fan_out=8).limits
    assert limits.chance < 0.02
    for _ in range(100):
        chosen.observe(seen(16, 16, 8, hit=1, rows=16 + 6 * 15, drafts=1, limits=limits))
    found = chosen.expected(16, 1, 0, fan_out=8)
    assert found.tokens == pytest.approx(8, rel=0.15)
    assert found.rows == pytest.approx(16 + 6 * 15, rel=0.15)
    # Those who draft for one only may have fewer.
    assert chosen.expected(16, 1, 0, fan_out=1).rows <= 16 + 15
    # What is not seen for long is forgotten.
    for _ in range(1000):
        chosen.observe(seen(16, 16, 8, hit=0, rows=16, drafts=1, limits=Limits(0.5, 0.0)))
    assert chosen.expected(16, 1, 0, fan_out=8).rows < 16 + 5 * 15


def test_a_width_of_one_teaches_nothing_of_break_points() -> None:
    """Canvases that were wider may still be read, with no drafts behind their break points."""
    assert chooser(1e-5).expected(1, 4, 0, fan_out=4).limits == NOTHING_MORE
    chosen = chooser(1e-5)
    before = chosen.expected(16, 1, 0, fan_out=4)
    for _ in range(20):
        chosen.observe(seen(16, 16, 13, hit=0, rows=16, drafts=1, limits=NOTHING_MORE))
    after = chosen.expected(16, 1, 0, fan_out=4)
    assert after.rows / before.rows == pytest.approx(1, abs=0.3) and after.rows > 16


def test_fewer_drafts_than_were_seen_hit_less_often() -> None:
    points = BreakPoints()
    for _ in range(50):
        points.observe(ALL.chance, drafts=6, hits=1, texts=1)
    assert points.expected(0, most=8) == pytest.approx((5.7, 0.97), rel=0.05)
    drafts, hits = points.expected(0, most=1)
    assert drafts == pytest.approx(1) and 0.2 < hits < 0.6
    assert points.expected(0, most=0) == (0, 0) and points.expected(1, most=8) == (0, 0)
