# SPDX-License-Identifier: Apache-2.0
"""Which rows a forward needs and how it ends, against references and cases worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_nbdiff.kernels.canvas_advance import (
    PAD,
    Emission,
    canvas_advance,
    canvas_advance_reference,
)
from vllm_nbdiff.kernels.canvas_rows import CanvasRows, canvas_rows, canvas_rows_reference
from vllm_nbdiff.kernels.canvas_table import CanvasTable, Kind, Mode, ScheduledBatch

MASK, LIMIT = 9, 200
SHAPE: dict[str, Any] = {"mask_token_id": MASK, "max_model_len": LIMIT}


def int32(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


def random_case(num_slots: int, length: int) -> tuple[CanvasTable, ScheduledBatch]:
    """Slots in every phase, and about two thirds of them scheduled."""
    width = int32(torch.randint(1, length + 1, (num_slots,)))
    tokens = torch.randint(0, MASK, (num_slots, length))
    density = torch.rand(num_slots, 1) * 1.4 - 0.2
    masked = torch.rand(num_slots, length) < density
    masked[:, 0] = False
    start = torch.randint(1, LIMIT + 3, (num_slots,))
    reach = torch.minimum(width, LIMIT - start)
    last_position = start + torch.randint(-1, 2 * length, (num_slots,))
    verifies = torch.rand(num_slots) < 0.4
    reach = torch.where(verifies, torch.minimum(reach, last_position - start + 1), reach)
    masked &= torch.arange(length) < reach[:, None]
    table = CanvasTable(
        tokens=torch.where(masked, MASK, tokens),
        causal=int32(~masked.any(1) | (verifies & (torch.rand(num_slots) < 0.5))),
        step=int32(torch.randint(0, 4, (num_slots,))),
        block_length=width,
        sub_block_length=int32(torch.randint(1, length + 1, (num_slots,))),
        max_steps=int32([[1, 3, 1 << 30][i % 3] for i in range(num_slots)]),
        verifies=int32(verifies),
        last_position=int32(last_position),
    )
    slot = torch.randperm(num_slots)[: max(1, num_slots * 2 // 3)]
    kind = int32(torch.tensor([0, 1, 2, 2, 2, 2])[torch.randint(0, 6, (len(slot),))])
    cut = (torch.rand(len(slot)) < 0.1).long()
    scheduled = torch.where(
        kind == Kind.CANVAS,
        (reach[slot] - cut).clamp(min=1),
        torch.randint(1, 2 * length, (len(slot),)),
    )
    query_start = torch.cat([torch.zeros(1), scheduled.cumsum(0)])
    return table, ScheduledBatch(slot, kind, int32(query_start), int32(start[slot] + scheduled))


def copy(table: CanvasTable) -> CanvasTable:
    return CanvasTable(*(column.clone() for column in table))


@pytest.mark.parametrize(
    ("num_slots", "length", "num_rows"),
    [(1, 1, 1), (9, 8, 8), (60, 8, 3), (90, 13, 13), (8, 64, 9)],
)
def test_rows_match_the_reference(num_slots: int, length: int, num_rows: int) -> None:
    table, batch = random_case(num_slots, length)
    before = copy(table)
    found = canvas_rows(table, batch, num_rows=num_rows, **SHAPE)
    expected = canvas_rows_reference(table, batch, num_rows=num_rows, **SHAPE)
    needed = expected.needed != 0
    for name in ("mode", "needed"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    filled = found.mode == Mode.FILL
    assert torch.equal(found.quota[filled], expected.quota[filled])
    for name in ("row", "position", "step"):
        assert torch.equal(getattr(found, name)[needed], getattr(expected, name)[needed]), name
    # A row that is not needed is still a row of its request.
    owner_start = batch.query_start[:-1, None]
    assert torch.equal(found.row[~needed], owner_start.expand_as(needed)[~needed].long())
    assert all(torch.equal(a, b) for a, b in zip(table, before, strict=True))


@pytest.mark.parametrize(("num_slots", "length"), [(1, 1), (9, 8), (120, 8), (90, 13), (8, 64)])
def test_advance_matches_the_reference(num_slots: int, length: int) -> None:
    table, batch = random_case(num_slots, length)
    rows = canvas_rows(table, batch, num_rows=length, **SHAPE)
    token = int32(torch.randint(0, MASK, rows.needed.shape))
    # Verified drafts are right about half of the time.
    following = table.tokens[batch.slot].roll(-1, 1).int()
    agrees = (torch.rand(rows.needed.shape) < 0.8) & (following != MASK)
    token = torch.where(agrees, following, token)
    probability = (torch.rand(rows.needed.shape) * 8).round() / 8
    num_filled = int32(torch.randint(0, 2, (len(batch.slot),)))
    arguments = (token, probability, num_filled)
    theirs = copy(table)
    found = canvas_advance(table, batch, rows, *arguments, **SHAPE)
    expected = canvas_advance_reference(theirs, batch, rows, *arguments, **SHAPE)
    for name, ours, reference in zip(CanvasTable._fields, table, theirs, strict=True):
        assert torch.equal(ours, reference), name
    assert torch.equal(found.num_emitted, expected.num_emitted)
    assert torch.equal(found.num_rejected, expected.num_rejected)
    emitted = torch.arange(length) < found.num_emitted[:, None]
    assert torch.equal(found.tokens[emitted], expected.tokens[emitted])


def one(
    canvas: list[int],
    *,
    kind: Kind = Kind.CANVAS,
    causal: bool = False,
    verifies: bool = False,
    start: int = 50,
    rows: int | None = None,
    max_steps: int = 1 << 30,
    step: int = 0,
    last_position: int = 150,
) -> tuple[CanvasTable, ScheduledBatch]:
    """A batch of one request of block length 4 and sub-blocks of 2, in slot 1 of 3."""
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    tokens[1] = torch.tensor(canvas)
    table = CanvasTable(
        tokens,
        int32([1, causal, 1]),
        int32([0, step, 0]),
        int32([4] * 3),
        int32([2] * 3),
        int32([max_steps] * 3),
        int32([verifies] * 3),
        int32([last_position] * 3),
    )
    count = len(canvas) if rows is None else rows
    batch = ScheduledBatch(
        torch.tensor([1]), int32([kind]), int32([0, count]), int32([start + count])
    )
    return table, batch


M, P = MASK, PAD.value


def rows_of(table: CanvasTable, batch: ScheduledBatch) -> CanvasRows:
    return canvas_rows(table, batch, num_rows=4, **SHAPE)


def advance(
    table: CanvasTable, batch: ScheduledBatch, token: list[int], num_filled: int = 1
) -> Emission:
    p = torch.tensor([[0.25, 0.5, 0.5, 0.75]])
    rows = rows_of(table, batch)
    return canvas_advance(table, batch, rows, int32([token]), p, int32([num_filled]), **SHAPE)


def test_a_denoise_step_needs_the_rows_before_masks_of_its_sub_block() -> None:
    table, batch = one([5, M, M, M], step=3)
    rows = rows_of(table, batch)
    assert rows.mode.item() == Mode.FILL
    assert rows.needed.tolist() == [[Mode.FILL, 0, 0, 0]]
    assert (rows.row[0, 0], rows.position[0, 0], rows.step[0, 0]) == (0, 51, 3)
    emission = advance(table, batch, [0] * 4)
    assert (emission.num_emitted.item(), emission.num_rejected.item()) == (0, 4)
    assert (table.causal[1], table.step[1]) == (0, 4)


def test_the_last_steps_look_further() -> None:
    """Three masks in two steps left: two of them now, the second in the next sub-block."""
    table, batch = one([5, M, M, M], step=1, max_steps=3)
    rows = rows_of(table, batch)
    assert rows.quota.item() == 2
    assert rows.needed.tolist() == [[Mode.FILL] * 3 + [0]]


def test_a_commit_emits_the_block_and_begins_the_next() -> None:
    table, batch = one([5, 6, 7, 8], causal=True)
    rows = rows_of(table, batch)
    assert rows.needed.tolist() == [[Mode.TEXT, 0, 0, 0]]
    assert (rows.row[0, 0], rows.position[0, 0]) == (3, 54)
    emission = advance(table, batch, [3, -1, -1, -1])
    assert emission.tokens.tolist() == [[5, 6, 7, 8]]
    assert (emission.num_emitted.item(), emission.num_rejected.item()) == (4, 0)
    assert table.tokens[1].tolist() == [3, M, M, M]
    assert (table.causal[1], table.step[1]) == (0, 0)


def test_the_end_of_a_prompt_begins_a_canvas_and_its_middle_does_not() -> None:
    table, batch = one([0, 0, 0, 0], kind=Kind.PROMPT_END, causal=True, rows=7)
    assert rows_of(table, batch).row[0, 0] == 6
    emission = advance(table, batch, [3, -1, -1, -1])
    assert emission.num_emitted.item() == emission.num_rejected.item() == 0
    assert table.tokens[1].tolist() == [3, M, M, M] and table.causal[1] == 0
    table, batch = one([0, 0, 0, 0], kind=Kind.PROMPT, causal=True, rows=7)
    advance(table, batch, [3] * 4)
    assert table.tokens[1].tolist() == [0, 0, 0, 0] and table.causal[1] == 1


def test_verified_drafts_are_kept_up_to_the_first_wrong_one() -> None:
    for said, kept, seed in (
        ([6, 7, 8, 3], [5, 6, 7, 8], 3),
        ([6, 2, 8, 3], [5, 6], 2),
        ([1, 7, 8, 3], [5], 1),
    ):
        table, batch = one([5, 6, 7, 8], causal=True, verifies=True)
        assert rows_of(table, batch).needed.tolist() == [[Mode.TEXT] * 4]
        emission = advance(table, batch, said)
        count = int(emission.num_emitted)
        assert emission.tokens[0, :count].tolist() == kept
        assert emission.num_rejected.item() == 4 - len(kept)
        assert table.tokens[1].tolist() == [seed, M, M, M]


def test_a_draft_is_verified_after_its_steps_and_up_to_its_first_mask() -> None:
    table, batch = one([5, 6, M, 8], verifies=True, max_steps=2, step=1)
    advance(table, batch, [0] * 4)
    assert table.causal[1] == 1
    rows = rows_of(table, batch)
    assert rows.needed.tolist() == [[Mode.TEXT, Mode.TEXT, 0, 0]]
    emission = advance(table, batch, [6, 4, -1, -1])
    assert emission.tokens[0, :2].tolist() == [5, 6] and emission.num_emitted.item() == 2
    assert table.tokens[1].tolist() == [4, M, M, M]


def test_a_step_that_filled_nothing_takes_the_likeliest_row() -> None:
    table, batch = one([5, M, M, M], max_steps=1)
    advance(table, batch, [1, 2, 3, 4], num_filled=0)
    assert table.tokens[1].tolist() == [5, M, 2, M]  # rows 1 and 2 are equal: the first


def test_canvases_end_where_the_model_or_the_wish_does() -> None:
    table, batch = one([5, 6, 7, 8], causal=True, start=LIMIT - 6)
    advance(table, batch, [3, -1, -1, -1])
    assert table.tokens[1].tolist() == [3, M, P, P]
    table, batch = one([5, 6, 7, 8], causal=True, verifies=True, start=50, last_position=54)
    advance(table, batch, [6, 7, 8, 3])
    assert table.tokens[1].tolist() == [3, P, P, P]
    assert table.causal[1] == 1  # a canvas of one token is read at once


def test_a_canvas_that_was_cut_counts_for_nothing() -> None:
    table, batch = one([5, M, M, M], rows=3)
    before = copy(table)
    assert rows_of(table, batch).mode.item() == Mode.NOTHING
    emission = advance(table, batch, [1] * 4, num_filled=0)
    assert (emission.num_emitted.item(), emission.num_rejected.item()) == (0, 3)
    assert all(torch.equal(a, b) for a, b in zip(table, before, strict=True))


def test_wrong_arguments_are_named() -> None:
    table, batch = one([5, M, M, M])
    with pytest.raises(ValueError, match=r"^causal: "):
        rows_of(table._replace(causal=table.causal.long()), batch)
    with pytest.raises(ValueError, match=r"^slot: outside"):
        rows_of(table, batch._replace(slot=torch.tensor([3])))
    with pytest.raises(ValueError, match=r"^kind: not a Kind"):
        rows_of(table, batch._replace(kind=int32([3])))
    with pytest.raises(ValueError, match=r"^num_rows: "):
        canvas_rows(table, batch, num_rows=5, **SHAPE)
    rows = rows_of(table, batch)
    with pytest.raises(ValueError, match=r"^token: "):
        canvas_advance(
            table, batch, rows, torch.zeros(1, 4), torch.zeros(1, 4), int32([1]), **SHAPE
        )
