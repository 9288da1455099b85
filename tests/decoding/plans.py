# SPDX-License-Identifier: Apache-2.0
"""The plan of one request's forward, and what its KV slots hold then."""

from typing import Any

import torch

from tests.decoding.test_canvas import options
from vllm_nbdiff.decoding.canvas import NO_TOKEN, Canvas, CanvasTable
from vllm_nbdiff.decoding.plan import Batch, Facts, Plan, make_plan
from vllm_nbdiff.decoding.rows import token_rows
from vllm_nbdiff.engine.forward import PagedBatch
from vllm_nbdiff.engine.kv_copies import copied_pages, copied_rows

MASK = 9


def plan_of(
    start: int,
    tokens: list[int],
    page_size: int,
    room: int,
    facts: dict[str, Any],
    confidence: list[float] | None = None,
    proposed: list[int] | None = None,
    **columns: Any,
) -> Plan:
    """Of a canvas of `tokens` at `start`, whose request has pages below `room`."""
    table = CanvasTable(1, len(tokens), 16, torch.device("cpu"))
    if confidence is not None:
        table.rank[0] = torch.tensor(confidence)
    if proposed is not None:
        table.proposed[0] = torch.tensor(proposed)
    own = {name: [value] for name, value in columns.items()}
    return plan_of_batch(table, [start], [tokens], [NO_TOKEN], page_size, room, facts, own)


def plan_of_batch(
    table: CanvasTable,
    starts: list[int],
    canvases: list[list[int]],
    guesses: list[int],
    page_size: int,
    room: int,
    facts: dict[str, Any],
    columns: dict[str, list[Any]],
    given: dict[str, torch.Tensor] | None = None,
    widths: torch.Tensor | None = None,
) -> Plan:
    """Of several requests with pages below `room` each; `columns` of their options, what is `given`
    of their batch, `widths` of their canvases."""
    count, length = len(canvases), len(canvases[0])
    one = torch.ones(count, dtype=torch.int64)
    state = Canvas(
        torch.tensor(canvases), torch.tensor(starts),
        length * one if widths is None else widths, 0 * one,
        torch.tensor(guesses), -one, 0 * one, 0 * one,
    )  # fmt: skip
    defaults = {"block_length": length, "sub_block_length": length, "max_steps": 1 << 30}
    defaults |= {"last_position": 1 << 30}
    own = options(**{name: [value] * count for name, value in defaults.items()} | columns)
    batch = Batch(
        slot=torch.arange(count),
        decodes=one > 0,
        scheduled=room * one,
        computed=0 * one,
        prompt_ends=one < 0,
        room=room * one,
        max_rows=(1 << 20) * one,
    )._replace(**given or {})
    known: dict[str, Any] = {"mask_token_id": MASK, "max_model_len": 1 << 20, "rules": (0,)}
    known |= {"page_size": page_size, "prefills": False, "fuses": False, "caches": False}
    return make_plan(table, state, own, batch, Facts(**(known | facts)))


def seen_by_segments(
    plan: Plan, page_size: int, num_pages: int, static: bool
) -> list[list[tuple[int, str]]]:
    """What every segment that has rows sees, as (position, whose) in the order of its KV.

    Whose: `text`, be it of earlier forwards or of this one, or the place of a canvas.
    """
    segments, state = plan.segments, plan.state
    start = int(state.start[0])
    pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1))[None] + 1
    paged: Any = PagedBatch.__new__(PagedBatch)
    paged.page_size, paged.block_tables = page_size, (pages,)
    kv: dict[int, tuple[int, str]] = {}
    for position in range(start):
        slot = int(pages[0, position // page_size]) * page_size + position % page_size
        kv[slot] = position, "text"
    source, target = copied_pages(plan, pages, page_size, static)
    before = dict(kv)
    for one, other in zip(source.tolist(), target.tolist(), strict=True):
        for offset in range(page_size):
            if one * page_size + offset in before:
                kv[other * page_size + offset] = before[one * page_size + offset]
    rows = token_rows(segments, None)
    exists = plan.canvases.exists
    first_canvas = segments.length.shape[1] - exists.shape[1] * int(exists.any())
    whose = [
        "text" if place < first_canvas else str(place - first_canvas)
        for place in rows.segment.tolist()
    ]
    written = list(zip(rows.position.tolist(), whose, strict=True))
    kv |= dict(zip(paged._slots(segments, rows).tolist(), written, strict=True))
    copied = copied_rows(plan, pages, page_size, torch.zeros(1, dtype=torch.int64), static)
    for row, slot in zip(*(part.tolist() for part in copied), strict=True):
        if slot >= 0:
            assert kv.get(slot, (0, "text"))[1] == "text", "a copy overwrites a canvas"
            kv[slot] = written[row]
    facts = Facts(MASK, 0, page_size, (), versions=1)
    tables = paged._segment_tables(segments, facts)[0].tolist()
    return [
        [
            kv[tables[place][p // page_size] * page_size + p % page_size]
            for p in range(int(segments.kv_length[0, place]))
        ]
        for place in range(segments.length.shape[1])
        if segments.length[0, place] > 0
    ]
