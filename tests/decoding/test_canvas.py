# SPDX-License-Identifier: Apache-2.0
"""State of canvases: what ends a request, and how wide a canvas is."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nbdiff.decoding.canvas import NO_TOKEN, CanvasTable, Options, width_at
from vllm_nbdiff.decoding.plan import Facts

VOCAB = 153_376


def options(**columns: Any) -> Options:
    """Options of requests; what is not given is 0."""
    count = len(next(iter(columns.values())))
    return Options(
        **{name: torch.tensor(columns.get(name, [0] * count)) for name in Options._fields}
    )


@given(
    st.sets(st.integers(0, 199), max_size=200),
    st.sets(st.integers(0, 199), max_size=200),
    st.lists(st.integers(0, 199), min_size=1, max_size=16),
)
def test_stop_tokens_are_those_of_the_request(
    mine: set[int], before: set[int], tokens: list[int]
) -> None:
    table = CanvasTable(3, 4, 200, torch.device("cpu"))
    table.set_stops(1, torch.tensor(sorted(before), dtype=torch.int64))
    table.set_stops(1, torch.tensor(sorted(mine), dtype=torch.int64))
    table.set_stops(2, torch.arange(200))
    line = torch.tensor([tokens, tokens, tokens])
    positions = torch.arange(len(tokens)).expand(3, -1) + 5
    given_ = options(last_position=[6, 5, 100])
    last = table.is_last(torch.tensor([0, 1, 2]), given_, line, positions)
    assert last[0].tolist() == [i == 1 for i in range(len(tokens))]
    assert last[1].tolist() == [i == 0 or token in mine for i, token in enumerate(tokens)]
    assert last[2].all()


def test_what_one_request_lists_costs_no_other_anything() -> None:
    """No shape depends on how many tokens end a request."""
    table = CanvasTable(4, 4, VOCAB, torch.device("cpu"))
    shape = table.stops.shape
    table.set_stops(1, torch.arange(20_000) * 7)
    assert table.stops.shape == shape
    tokens = torch.tensor([[7, 8, 31, 63, 139_993]])
    nowhere = torch.full_like(tokens, 9)
    last = table.is_last(torch.tensor([1]), options(last_position=[0]), tokens, nowhere)
    assert last[0].tolist() == [True, False, False, True, True]
    table.set_stops(1, torch.tensor([31], dtype=torch.int64))
    last = table.is_last(torch.tensor([1]), options(last_position=[0]), tokens, nowhere)
    assert last[0].tolist() == [False, False, True, False, False]


def test_a_request_has_no_proposals_of_the_one_before() -> None:
    table = CanvasTable(2, 4, 200, torch.device("cpu"))
    table.proposed[:] = 7
    table.forget_proposals(1)
    assert table.proposed.tolist() == [[7] * 4, [NO_TOKEN] * 4, [7] * 4]


@given(st.integers(0, 99), st.integers(1, 32), st.integers(0, 120), st.booleans())
def test_width(start: int, length: int, last: int, verifies: bool) -> None:
    given_ = options(block_length=[length], last_position=[last], verifies=[verifies])
    expected = min(length, 100 - start, last - start + 1 if verifies else length)
    assert int(width_at(given_, torch.tensor([start]), Facts(0, 100, 16, ()))[0]) == expected


def test_a_stop_token_counts_from_min_tokens_on() -> None:
    """As in vLLM's scheduler, which goes on before; the last position ends any request."""
    table = CanvasTable(1, 4, 200, torch.device("cpu"))
    table.set_stops(0, torch.tensor([7]))
    given_ = options(last_position=[14], first_stop=[12])
    tokens, positions = torch.full((1, 5), 7), torch.arange(10, 15)[None]
    last = table.is_last(torch.tensor([0]), given_, tokens, positions)
    assert last[0].tolist() == [False, False, True, True, True]
    last = table.is_last(torch.tensor([0]), given_, tokens + 1, positions)
    assert last[0].tolist() == [False, False, False, False, True]
