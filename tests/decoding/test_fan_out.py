# SPDX-License-Identifier: Apache-2.0
"""Drafts for break points: which are made, what they see, which becomes the next draft."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.decoding.plans import MASK, plan_of, plan_of_batch, seen_by_segments
from vllm_nbdiff.decoding.canvas import NO_TOKEN, CanvasTable
from vllm_nbdiff.decoding.decide import Text
from vllm_nbdiff.decoding.fan_out import VerifiedTexts, drafts, likeliest, made, survival
from vllm_nbdiff.engine.lookahead import break_point_room
from vllm_nbdiff.families.family import NBDIFF, NEMOTRON, Family


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
)
def test_break_points_by_how_likely_they_are(
    confidence: list[float], text: int, count: int, ends: bool
) -> None:
    """Against the enumeration of which drafted columns are right."""
    text, count = min(text, len(confidence)), min(count, len(confidence))
    chances = [0.0] * text
    for right in itertools.product([True, False], repeat=text - 1):
        weight = 1.0
        for one, chance in zip(right, confidence[1:], strict=False):
            weight *= chance if one else 1 - chance
        held = next((m for m, one in enumerate(right) if not one), text - 1)
        chances[held] += weight
    breaks = text - ends  # behind a token that ends the request nothing is drafted
    lengths = torch.tensor([text]), torch.tensor([breaks])
    points, found = likeliest(torch.tensor([confidence]), *lengths, count)
    wanted = sorted(range(breaks), key=lambda m: (-max(chances[m], 1e-9), m))[:count]
    assert points[0, : len(wanted)].tolist() == wanted
    expected = [max(chances[m], 1e-9) for m in wanted] + [0.0] * (count - len(wanted))
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_chance_that_a_column_and_all_before_it_hold() -> None:
    found = survival(torch.tensor([[0.1, 0.5, 1.5, 0.5]]))
    assert found.tolist() == [[1.0, 0.5, 0.5, 0.25]]


@given(
    st.integers(0, 300), st.integers(2, 32), st.integers(1, 32), st.integers(0, 9),
    st.sampled_from([1, 16, 32, 128]), st.integers(0, 400), st.booleans(),
    st.sampled_from([NBDIFF, NEMOTRON]), st.data(),
)  # fmt: skip
def test_a_canvas_sees_the_text_up_to_its_break_point_and_itself(
    start, length, known, count, page_size, less, static, family, data
) -> None:  # type: ignore[no-untyped-def]
    """Whatever the pages; the text itself is causal and sees no canvas."""
    known, count = min(known, length), min(count, length)
    chances = st.floats(0, 1, width=32)
    confidence = data.draw(st.lists(chances, min_size=length, max_size=length))
    room = start + length + break_point_room(count, length, page_size) + family.known_rows
    room = max(room - less, start + length)
    tokens = [1] * known + [MASK] * (length - known)
    plan = plan_of(
        start, tokens, page_size, room,
        {"drafts": True, "fan_out": count, "denoises": False, "family": family}, confidence,
        drafts=True, fan_out=count, verifies=True,
    )  # fmt: skip
    canvases = plan.canvases
    assert int(plan.text[0]) == known
    seen = seen_by_segments(plan, page_size, -(-room // page_size), static)
    assert seen[0] == [(position, "text") for position in range(start + known)]
    existing = canvases.exists[0].nonzero()[:, 0].tolist()
    assert len(seen) == 1 + len(existing)
    for place, own in zip(existing, seen[1:], strict=True):
        begin, rows = int(canvases.start[0, place]), int(canvases.high[0, place])
        whole = length - int(family.shifts)
        # Behind a token that is read alone a canvas is narrower where there is no room for it.
        assert rows == (min(whole, room - begin) if known == 1 else whole)
        text = [(position, "text") for position in range(begin)]
        assert own == text + [(begin + column, str(place)) for column in range(rows)]
    if not less:
        # One that crosses the end of a page may take the room of another one.
        fits = min(count, 1) if page_size < length else count // 2
        assert len(existing) >= (1 if known == 1 else min(fits, known))
    if known > 1:
        assert len(existing) <= count


@pytest.mark.parametrize("fan_out", [0, 4])
def test_nothing_behind_the_end_of_a_request_is_verified(fan_out: int) -> None:
    """Nor drafted: the second column ends the first request, and the third one its text."""
    table = CanvasTable(4, 4, 16, torch.device("cpu"))
    table.stops[:, 3] = True
    own = {
        "verifies": [True, True, True, False],
        "drafts": [True, True, True, False],
        "fan_out": 3 * [fan_out] + [0],
        "first_stop": [11, 12, 0, 0],  # the second one goes on, as of `min_tokens`
        "last_position": [100, 100, 12, 100],  # behind column 1 one token is left
        "max_steps": [0, 0, 0, 1 << 30],
    }
    canvases = [[1, 3, 4, 3], [1, 3, 4, 3], [1, 4, 4, 4], [1, 3, 4, 3]]
    facts = {"drafts": True, "fan_out": fan_out, "denoises": True, "verifies": True}
    plan = plan_of_batch(table, 4 * [10], canvases, 4 * [NO_TOKEN], 1, 200, facts, own)
    assert plan.text.tolist() == [2, 4, 3, 4]
    assert plan.segments.length[:, 0].tolist() == [2, 4, 3, 4]
    begins = torch.where(plan.canvases.exists, plan.canvases.start, 0)
    behind = [sorted(set(row) - {0}) for row in begins.tolist()]
    assert behind == ([[11], [11, 12, 13], [11], []] if fan_out else 4 * [[]])


@pytest.mark.parametrize(("family", "width"), [(NBDIFF, 8), (NEMOTRON, 7)])
def test_a_token_that_is_read_alone_has_a_canvas_behind_it(family: Family, width: int) -> None:
    """No wider than there are rows, where the text may go on; a drafted text has none behind it."""
    table = CanvasTable(7, 8, 16, torch.device("cpu"))
    table.stops[:, 3] = True
    known = [[1], [1], [3], [1, 2], [1], [1], [1]]
    canvases = [tokens + [MASK] * (8 - len(tokens)) for tokens in known]
    own = {
        "verifies": 7 * [True],
        "drafts": [True, True, True, True, False, True, True],
        "last_position": [100, 14, 100, 100, 100, 11, 9],
        "max_steps": 7 * [1],
    }
    facts = {"drafts": True, "verifies": True, "family": family}
    given = {"max_rows": torch.tensor([8, 9, 9, 9, 8, 8, 8])}
    # The last one has ended, which was not known when it was scheduled.
    widths = torch.tensor([8, 8, 8, 8, 8, 2, 0])
    plan = plan_of_batch(
        table, 7 * [10], canvases, 7 * [NO_TOKEN], 1, 200, facts, own, given, widths
    )
    assert plan.text.tolist() == [1, 1, 1, 2, 0, 1, 0]
    assert plan.canvases.exists[:, 0].tolist() == [True, True, False, False, True, False, False]
    assert plan.canvases.start[:2, 0].tolist() == [11, 11]
    assert plan.canvases.width[:2, 0].tolist() == [width, 4]
    # What it costs is the draft's, whose width may have been chosen since.
    assert VerifiedTexts(plan, plan.text, None).numbers()[0][:4].tolist() == [width, 4, 8, 8]
    high = plan.canvases.high[:, 0] - 1 + int(family.shifts)
    assert high[:2].tolist() == [width - 1, 3]
    # The first column stands for the token that the text's row gives.
    assert plan.canvases.active[0, 0].tolist() == [0 < j < width for j in range(8)]
    assert not plan.look[:4].any() and plan.look[4]


@pytest.mark.parametrize("fan_out", [0, 4])
def test_a_draft_behind_a_single_token_stays_on_its_pages(fan_out: int) -> None:
    facts = {"drafts": True, "fan_out": fan_out, "denoises": False}
    own = {"drafts": True, "fan_out": fan_out, "verifies": True}
    plan = plan_of(10, [1] + [MASK] * 7, 1, 14, facts, **own)
    assert plan.canvases.exists[0, 0]
    assert int(plan.canvases.start[0, 0] + plan.canvases.high[0, 0]) == 14


def test_the_draft_behind_the_break_is_the_next_one() -> None:
    length = 4
    plan = plan_of(
        10, [1, 2, 3, 4], 1, 200, {"drafts": True, "fan_out": 2, "denoises": False},
        [1, 0.9, 0.2, 0.9], drafts=True, fan_out=2, verifies=True,
    )  # fmt: skip
    assert (plan.canvases.start[0] - 11).tolist() == [1, 3]
    token = torch.arange(2 * length).view(1, 2, length) + 20
    chance = torch.full(token.shape, 0.5)
    for held, expected in ((1, None), (2, [MASK, 21, 22, 23]), (4, [MASK, 25, 26, 27])):
        one = torch.tensor([held])
        found = drafts(plan, Text(one, one, 10 + one, one > 9), token, chance, MASK)
        assert found.token[0].tolist() == (expected or [MASK] * length)
        assert bool(found.hit) == (expected is not None)


def test_drafts_are_of_those_who_ask_for_them() -> None:
    """Beside them: one that fuses, whose next canvas begins where its text ends, and one whose
    text is its seed alone, of which no fan-out is counted."""
    table = CanvasTable(3, 4, 16, torch.device("cpu"))
    own = {
        "drafts": [True, False, True],
        "verifies": [True, False, True],
        "fan_out": [2, 0, 2],
        "fuses": [False, True, False],
        "max_steps": [1, 1, 1],
    }
    facts = {"drafts": True, "fan_out": 2, "fuses": True}
    canvases = [[1, 2, 3, 4], [1, 2, 3, 4], [1, MASK, MASK, MASK]]
    plan = plan_of_batch(table, 3 * [10], canvases, [NO_TOKEN, 5, NO_TOKEN], 1, 200, facts, own)
    assert plan.text.tolist() == [4, 4, 1] and plan.ahead.tolist() == [False, True, False]
    assert plan.canvases.exists[:, 0].all()
    begin = plan.canvases.start[:, 0]
    text = Text(begin - 10, begin, begin, begin < 0)
    shape = plan.canvases.tokens.shape
    found = drafts(plan, text, torch.full(shape, 7), torch.ones(shape), MASK)
    assert found.hit.tolist() == [True, False, True]
    count, hit = made(plan, found.hit)
    assert count.tolist() == [2, 0, 0] and hit.tolist() == [True, False, False]
