# SPDX-License-Identifier: Apache-2.0
"""The width that mode `auto` chooses, against clocks and acceptances made up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.auto_cases import chooser, learn, most_common, seen, serve
from vllm_nbdiff.engine.chooser import DraftChooser, Verified
from vllm_nbdiff.engine.cost import CostModel


def test_free_rows_draft_as_much_as_is_right() -> None:
    assert most_common(serve(chooser(0.0), 0.97, 1)) == 32


def test_dear_rows_decode_one_token() -> None:
    """With many requests; with few, where rows hardly cost, the same engine drafts again."""
    chosen = chooser(1e-4)
    assert most_common(serve(chosen, 0.9, 64)) == 1
    assert most_common(serve(chosen, 0.95, 1)) > 1


def test_wrong_drafts_are_given_up() -> None:
    chosen = chooser(1e-5)
    assert most_common(serve(chosen, 0.95, 4)) > 1
    assert most_common(serve(chosen, 0.1, 4)) == 1
    assert most_common(serve(chosen, 0.95, 4, drafts=2000)) > 1


def test_a_busy_machine_changes_no_choice() -> None:
    """Forwards of the chosen width that take three times as long say nothing about this width."""
    chosen = chooser(1e-5)
    width = most_common(serve(chosen, 0.92, 4))
    assert width > 1
    rows = 4 * width
    for _ in range(40):
        chosen.cost.observe(rows, 3 * (1e-3 + 1e-5 * rows))
    assert chosen.cost.seconds(rows) > 2 * (1e-3 + 1e-5 * rows)
    assert most_common(serve(chosen, 0.92, 4)) == width


def test_a_width_that_is_slow_for_long_is_left() -> None:
    chosen = chooser(1e-5)
    width = most_common(serve(chosen, 0.9, 4))
    for _ in range(200):
        chosen.cost.observe(4 * width, 8e-3)
        chosen.cost.observe(4, 1e-3)
    assert most_common(serve(chosen, 0.9, 4)) != width


def test_a_forward_that_makes_a_draft_may_give_a_token() -> None:
    """Two forwards a round, one of which gives a token where drafts are made in the forwards that
    read it."""
    chosen = chooser(0.0)
    for _ in range(600):
        chosen.observe(seen(16, 16, 8, hit=0, rows=16))
    assert chosen.expected(16, 1, 0).tokens == pytest.approx(8 / 2, rel=0.05)
    for _ in range(600):
        chosen.observe(seen(16, 16, 8, hit=0, rows=16, drafts=1))
    assert chosen.expected(16, 1, 0).tokens == pytest.approx((8 + 1) / 2, rel=0.05)


def test_what_lies_behind_the_end_of_a_text_is_of_no_use() -> None:
    """Where texts have 64 tokens, wide drafts give less than all of their columns."""
    chosen = chooser(0.0)
    for _ in range(600):
        chosen.observe(seen(32, 32, 32, hit=0, rows=32))
    endless = {width: chosen.expected(width, 1, 0).tokens for width in (8, 32)}
    assert list(endless.values()) == pytest.approx([8 / 2, 32 / 2], rel=0.01)
    chosen.observe_ends(tokens=6400, ended=100)
    held = sum((1 - 1 / 64) ** column for column in range(32))
    assert chosen.expected(32, 1, 0).tokens == pytest.approx(held / 2, rel=0.01)
    assert chosen.expected(8, 1, 0).tokens > 0.9 * endless[8]


def test_rounds_that_give_less_than_their_columns_promise() -> None:
    """Texts of 20 tokens: every second draft of 16 ends with its fourth column, which holds."""
    chosen = chooser(0.0)
    for _ in range(600):
        chosen.observe(seen(16, 16, 16, hit=0, rows=16))
        chosen.observe(seen(16, 4, 4, hit=0, rows=4))
        chosen.observe_ends(tokens=20, ended=1)
    assert chosen.expected(16, 1, 0).tokens == pytest.approx(10 / 2, rel=0.03)


def test_rows_that_are_computed_anyway_save_nothing() -> None:
    """With static shapes a narrow draft takes as long as a wide one, which gives more tokens."""
    cost = CostModel()
    for _ in range(20):
        cost.observe(64 * 32, 20e-3)
    for static, wide in ((False, False), (True, True)):
        chosen = DraftChooser(cost, max_width=32, max_forwards=1, static=static)
        assert (most_common(serve(chosen, 0.9, 64)) == 32) == wide


def test_a_large_batch_of_dear_rows_soon_decodes_one_token() -> None:
    """From the first forward on, of a machine and a text that nothing is known of: 64 requests,
    whose forwards take what their rows do, half of it beside the model."""
    chosen = DraftChooser(CostModel(), max_width=32, max_forwards=16)
    widths = learn(chosen, 64, 0.8, lambda rows: 10e-3 + 1e-3 * rows, choices=24)
    assert most_common(widths[12:]) == 1


def test_dear_rows_of_few_requests_are_soon_seen() -> None:
    """Of four requests rows cost what they take, but the first ones hardly."""
    chosen = DraftChooser(CostModel(), max_width=32, max_forwards=16)
    widths = []
    for _ in range(30):
        width = chosen.choose(4, other_rows=0)
        widths.append(width)
        if width > 1:
            chosen.observe(seen(width, width, max(width - 4, 1), hit=0, rows=width))
        chosen.cost.observe(4 * width, max(60e-3, 11e-3 * 4 * width))
    assert most_common(widths[8:]) == 1 and len(set(widths[8:])) < 3


@pytest.mark.parametrize("requests", [16, 64])
def test_what_would_lose_much_is_not_tried(requests: int) -> None:
    """Where rows take their time, as forwards of 4 requests have shown, no wide draft of many
    requests is run to see what its rows cost."""

    def seconds(rows: int) -> float:
        return 40e-3 + 3.5e-3 * rows

    chosen = DraftChooser(CostModel(), max_width=32, max_forwards=16)
    for rows in (64, 4, 64, 32, 128):
        chosen.cost.observe(rows, seconds(rows))
    widths = learn(chosen, requests, 0.95, seconds, choices=30)
    assert requests * max(widths) <= 256 and most_common(widths[15:]) == 1


def test_what_is_tried_now_and_then_loses_little_time() -> None:
    """Where the next wider draft takes 6 times as long, and does not pay: of 64 forwards one."""
    chosen = chooser(4e-5)
    widths = serve(chosen, 0.9, 64, drafts=4000)
    assert set(widths) == {1, 8}
    narrow, wide = (chosen.expected(width, 64, 0).speed for width in (1, 8))
    lost = widths.count(8) * chosen.cost.seconds(64 * 8) * (1 - wide / narrow)
    assert lost < 1.2 / 64 * widths.count(1) * chosen.cost.seconds(64)


def test_schedules_that_end_with_a_request_want_more_tokens_a_forward() -> None:
    """Where one of 64 ends in nearly every forward, what happens between schedules counts."""
    chosen = chooser(2e-5)
    for _ in range(100):
        seconds = chosen.cost.seconds(64)
        chosen.observe_schedule([(64, seconds)], 0.03 + seconds)
    assert most_common(serve(chosen, 0.9, 64)) == 1
    for _ in range(100):
        chosen.observe_ends(tokens=600, ended=10)
    assert most_common(serve(chosen, 0.9, 64)) > 1


def test_no_forward_begins_after_the_time_of_a_schedule() -> None:
    """What lies between schedules, here 0.2 s, is shared by fewer forwards the longer they take."""
    for seconds_of_row, seconds in ((0.0, 1e-3), (1e-3, 17e-3)):
        chosen = chooser(seconds_of_row)
        chosen.room = 10_000
        chosen.observe_schedule([(16, seconds)], 1.0 + seconds)
        unbounded = chosen.expected(16, 1, 0).speed
        chosen.max_seconds = 0.01
        expected = (seconds + 0.2 / (1 + 0.01 / seconds)) / (seconds + 0.2 / 16)
        assert unbounded / chosen.expected(16, 1, 0).speed == pytest.approx(expected, rel=0.05)


def test_a_machine_that_stood_still_is_soon_forgotten() -> None:
    """For an hour, in the middle of a text."""
    chosen = chooser(1e-5)
    seconds, before = chosen.cost.seconds(16), chosen.expected(16, 1, 0).speed
    chosen.observe_schedule([(16, seconds)], 3600.0)
    for _ in range(35):
        chosen.observe_schedule([(16, seconds)], seconds)
    assert chosen.expected(16, 1, 0).speed == pytest.approx(before, rel=0.2)


def test_the_first_forward_of_a_schedule_takes_longer() -> None:
    """What vLLM does beside it is no matter of rows, but shared by all forwards of a schedule."""
    chosen = chooser(1e-5)
    rows, seconds = 16, chosen.cost.seconds(16)
    for _ in range(50):
        chosen.observe_schedule([(rows, 3 * seconds), *3 * [(rows, seconds)]], 6.5 * seconds)
    for _ in range(50):
        chosen.observe_schedule([(rows, 3 * seconds)], 3.5 * seconds)
    assert chosen.cost.seconds(16) == pytest.approx(seconds, rel=0.05)
    chosen.room, chosen.max_forwards = 10_000, 1
    tokens = chosen.expected(16, 1, 0).tokens
    assert chosen.expected(16, 1, 0).speed == pytest.approx(tokens / (3.5 * seconds), rel=0.05)


@given(
    forwards=st.lists(
        st.tuples(
            st.integers(0, 64),  # requests
            st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e3]),  # seconds
            st.integers(0, 3),  # seed
        ),
        max_size=40,
    )
)
def test_whatever_is_seen_a_width_is_chosen(forwards: list[tuple[int, float, int]]) -> None:
    chosen = DraftChooser(CostModel(), max_width=32, max_forwards=16)
    for count, seconds, seed in forwards:
        random = np.random.default_rng(seed)
        width = random.integers(1, 33, count)
        text = random.integers(1, width + 1)
        accepted = random.integers(1, text + 1)
        hit = random.integers(0, 2, count)
        limits = random.random((2, count))
        chosen.observe(Verified(width, text, accepted, hit, width * 3, hit, *limits))
        chosen.cost.observe(max(int(width.sum()), 1), seconds)
        chosen.observe_ends(int(accepted.sum()), int(random.integers(0, count + 1)))
        own = max(int(width.sum()), 1), seconds / 2
        chosen.observe_schedule(seed * [own], seconds if seed else None)
        for fan_out in (0, 3):
            assert chosen.choose(max(count, 1), 0, fan_out) in (1, 8, 16, 32)
            for limited in (8, 16, 32):
                found = chosen.expected(limited, max(count, 1), 64, fan_out)
                assert all(np.isfinite([found.tokens, found.rows, found.speed, *found.limits]))


def test_columns_that_are_never_reached_stay_known() -> None:
    """However long ago they were tried."""
    chosen = chooser(0.0)
    for _ in range(40_000):
        chosen.observe(seen(8, 8, 4, hit=0, rows=8))
    assert 1 < chosen.expected(32, 1, 0).tokens < 16


def test_what_has_no_canvas_teaches_nothing() -> None:
    """A request that ended may be read once more with none, or less than none."""
    chosen, plain = chooser(1e-5), chooser(1e-5)
    for width in (0, -3, 1, 0):
        chosen.observe(seen(width, 1, 1, hit=0, rows=1, drafts=1))
    for width in (1, 8, 16, 32):
        assert chosen.expected(width, 4, 0) == plain.expected(width, 4, 0)


def test_an_acceptance_that_comes_back_is_found() -> None:
    """However noisy forwards are: rows are not taken to be dearer for a single width being run."""
    for seed in range(4):
        random = np.random.default_rng(seed)

        def seconds(rows: int, random: np.random.Generator = random) -> float:
            return (10e-3 + 1e-3 * rows) * float(random.lognormal(0, 0.2))

        chosen = DraftChooser(CostModel(), max_width=32, max_forwards=16)
        learn(chosen, 1, 0.5, seconds, choices=700)
        widths = learn(chosen, 1, 0.95, seconds, choices=700)
        assert most_common(widths[500:]) > 1, seed


@pytest.mark.parametrize("static", [False, True])
def test_nothing_is_tried_again_and_again_where_no_forward_is_timed(static: bool) -> None:
    """As beside prompts."""
    chosen = DraftChooser(CostModel(), max_width=32, max_forwards=16, static=static)
    widths = learn(chosen, 4, 0.97, None, choices=200)
    assert widths[50:].count(1) < 5
