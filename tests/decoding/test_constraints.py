# SPDX-License-Identifier: Apache-2.0
"""Logit constraints against their definitions, without an engine."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nbdiff.decoding.bad_words import BadWords, group_words
from vllm_nbdiff.decoding.constraints import Constraints, Context, Penalties, Thinking, penalize

VOCAB, MASK = 10, 0
# Prompt 3 4, committed 5 5, canvas 6 _ 5 _, then what the runner left behind.
TEXT = torch.tensor([3, 4, 5, 5, 9, 9])
CANVAS = torch.tensor([6, MASK, 5, MASK])
END = 4


def context(positions: list[int]) -> Context:
    """Rows that predict canvas positions and see all that is filled."""
    n = len(positions)
    canvas = CANVAS.expand(n, -1)
    return Context(
        slot=torch.zeros(n, dtype=torch.int64),
        text_end=torch.full((n,), END),
        canvas=canvas,
        known=canvas != MASK,
        position=torch.tensor(positions),
        follows=torch.zeros(n, dtype=torch.bool),
    )


def constraints(**fields: Any) -> Constraints:
    defaults: dict[str, Any] = {
        "prompt_length": 2, "allowed": None, "bias": None, "min_tokens": 0, "stop_ids": None,
        "repetition": 1.0, "frequency": 0.0, "presence": 0.0, "bad_words": [],
        "thinking": None,
    }  # fmt: skip
    return Constraints(**(defaults | fields))


def rows(positions: list[int]) -> torch.Tensor:
    return torch.linspace(-2, 2, VOCAB).repeat(len(positions), 1)


def test_none_without_constraints() -> None:
    assert not constraints().any
    assert constraints(presence=0.1).any and constraints(presence=0.1).penalized


def penalized(prompt_length: int = 2, **values: float) -> torch.Tensor:
    logits = rows([5, 7])
    columns = [
        torch.full((2, 1), values.get(name, default))
        for name, default in (("repetition", 1.0), ("frequency", 0.0), ("presence", 0.0))
    ]
    penalties = Penalties(*columns, prompt_length=torch.full((2, 1), prompt_length))
    penalize(logits, penalties, context([5, 7]), TEXT.expand(2, -1), MASK)
    return logits


def test_penalties() -> None:
    """presence and frequency count output tokens, repetition the prompt too; masks do not count."""
    base = torch.linspace(-2, 2, VOCAB)
    count = torch.tensor([0.0, 0, 0, 0, 0, 3, 1, 0, 0, 0])
    expected = base - 0.25 * count - 0.5 * (count > 0)
    torch.testing.assert_close(penalized(presence=0.5, frequency=0.25), expected.repeat(2, 1))
    expected = base.clone()
    for token in (3, 4, 5, 6):
        expected[token] = base[token] / 1.5 if base[token] > 0 else base[token] * 1.5
    torch.testing.assert_close(penalized(repetition=1.5)[0], expected)


def test_the_tail_of_a_prompt_in_a_canvas_is_no_output() -> None:
    base = torch.linspace(-2, 2, VOCAB)
    expected = base - 0.5 * (torch.arange(VOCAB) == 5)
    torch.testing.assert_close(penalized(END + 1, presence=0.5)[0], expected)
    tail = penalized(END + 1, repetition=1.5)[0]
    assert tail[6] == base[6] / 1.5


@pytest.mark.parametrize(("end", "forced"), [(3, [6, 7]), (8, [6, 7]), (5, []), (7, [])])
def test_a_spent_budget_ends_thinking(end: int, forced: list[int]) -> None:
    """Of tokens that follow all that is seen, and where the output seen does not hold the end."""
    canvas, positions = torch.tensor([[6, 7, 6, 8]]).expand(4, -1), [5, 6, 7, 7]
    here = Context(
        torch.zeros(4, dtype=torch.int64), torch.full((4,), END), canvas,
        torch.arange(4) < torch.tensor(positions)[:, None] - END, torch.tensor(positions),
        torch.tensor([True, True, True, False]),
    )  # fmt: skip
    logits = rows(positions)
    constraints(thinking=Thinking(4, end)).after_penalties(logits, here, TEXT.expand(4, -1))
    chances = logits.softmax(1)
    assert [p for p, row in zip(positions, chances, strict=True) if row[end] == 1] == forced
    untouched = [not torch.isinf(row).any() for row in logits]
    assert untouched == [p not in forced or i == 3 for i, p in enumerate(positions)]


def test_a_next_token_sees_what_stands_before_it() -> None:
    """Of a text that is verified, a row sees the columns up to its own."""
    canvas = torch.tensor([[6, 7, 6, 8]]).expand(3, -1)
    seen = torch.arange(4) < torch.tensor([[1], [2], [3]])
    logits = rows([5, 6, 7])
    here = Context(
        torch.zeros(3, dtype=torch.int64), torch.full((3,), END), canvas, seen,
        torch.tensor([5, 6, 7]), torch.ones(3, dtype=torch.bool),
    )  # fmt: skip
    one = torch.ones(3, 1)
    penalties = Penalties(one, one, 0 * one, torch.full((3, 1), 2))
    penalize(logits, penalties, here, TEXT.expand(3, -1), MASK)
    taken = torch.linspace(-2, 2, VOCAB) - logits
    assert taken[:, 6].round().tolist() == [1, 1, 2]
    assert taken[:, 7].round().tolist() == [0, 1, 1]
    assert taken[:, 8].tolist() == [0, 0, 0] and taken[:, 5].round().tolist() == [2, 2, 2]


def test_allowed_and_bias() -> None:
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[2, 7]] = True
    one = constraints(allowed=allowed, bias=(torch.tensor([7]), torch.tensor([5.0])))
    result = rows([5])
    one.before_penalties(result, context([5]))
    assert result[0].isfinite().nonzero()[:, 0].tolist() == [2, 7]
    assert result[0, 7] == torch.linspace(-2, 2, VOCAB)[7] + 5


def test_min_tokens_by_position() -> None:
    one = constraints(min_tokens=4, stop_ids=torch.tensor([8, 1]))
    result = rows([5, 7])
    one.before_penalties(result, context([5, 7]))
    assert result[:, 8].isneginf().tolist() == result[:, 1].isneginf().tolist() == [True, False]
    assert result[:, 2:8].isfinite().all()


def completing(words: list[list[int]], position: int, line: list[int]) -> set[int]:
    """Tokens that at `position` of a line, masks unknown, would complete a word."""
    banned = set()
    for word in words:
        for offset, token in enumerate(word):
            begin = position - offset
            if begin < 0 or begin + len(word) > len(line):
                continue
            others = [i for i in range(begin, begin + len(word)) if i != position]
            if all(line[i] == word[i - begin] != MASK for i in others):
                banned.add(token)
    return banned


WORDS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=5)
LINES = st.lists(st.sampled_from([1, 2, 3, 4, MASK, MASK]), min_size=1, max_size=7)


def grouped(words: list[list[int]]) -> list[BadWords]:
    return [BadWords(torch.tensor(group)) for group in group_words(words)]


@given(WORDS, st.lists(st.integers(1, 4), min_size=1, max_size=6), LINES)
def test_bad_words_from_both_sides(
    words: list[list[int]], text: list[int], canvas: list[int]
) -> None:
    line, masked = text + canvas, [i for i, token in enumerate(canvas) if token == MASK]
    for column in masked:
        where, end = torch.tensor([canvas]), torch.tensor([len(text)])
        logits = torch.zeros(1, VOCAB)
        position = len(text) + column
        for bad in grouped(words):
            around = bad.line(end, where, where != MASK, torch.tensor([text]))
            bad.ban(logits, around, torch.tensor([position]))
        assert set(logits[0].isneginf().nonzero()[:, 0].tolist()) == completing(
            words, position, line
        )


@given(WORDS, st.lists(st.integers(1, 4), min_size=1, max_size=6), LINES, st.data())
def test_no_word_is_filled_at_once(
    words: list[list[int]], text: list[int], canvas: list[int], data: st.DataObject
) -> None:
    """What is left of positions filled together forms no word, and the most confident is left."""
    chosen, filled = [], list(canvas)
    for column in [i for i, token in enumerate(canvas) if token == MASK]:
        # Each of them alone completes no word, as `ban` sees to.
        free = sorted({1, 2, 3, 4} - completing(words, len(text) + column, text + canvas))
        if free and data.draw(st.booleans()):
            filled[column] = data.draw(st.sampled_from(free))
            chosen.append(column)
    accepted = torch.tensor([i in chosen for i in range(len(canvas))])
    rank = torch.tensor([data.draw(st.integers(0, 3)) / 4 for _ in canvas])
    before = torch.tensor(canvas)
    kept = accepted
    for bad in grouped(words):
        kept = bad.undo(
            kept,
            before != MASK,
            torch.where(kept, torch.tensor(filled), before),
            rank,
            torch.tensor(len(text)),
            torch.tensor(text),
        )
    assert not (kept & ~accepted).any()
    assert bool(kept.any()) == bool(chosen)
    line = text + torch.where(kept, torch.tensor(filled), before).tolist()
    for word in words:
        for begin in range(len(line) - len(word) + 1):
            span = range(begin, begin + len(word))
            if any(i >= len(text) and kept[i - len(text)] for i in span):
                assert [line[i] for i in span] != word
