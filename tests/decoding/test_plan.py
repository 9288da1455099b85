# SPDX-License-Identifier: Apache-2.0
"""What a CPU leaves out of a plan, where nothing of the kind is there, changes nothing."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.decoding.plans import MASK, plan_of_batch
from vllm_nbdiff.decoding.canvas import NO_TOKEN, CanvasTable
from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.rows import token_rows
from vllm_nbdiff.families.family import NBDIFF, SDAR

LENGTH = 4
KNOWN = 5


def computed(plan: Plan, request: int) -> tuple[list[Any], list[Any]]:
    """Rows of a request in the forward, each with what it sees, and what is predicted from which
    row."""
    segments = plan.segments
    rows = token_rows(segments, None)
    own = [row for row, owner in enumerate(rows.owner.tolist()) if owner == request]
    places = rows.segment[own]
    seen = zip(
        segments.kv_length.flatten()[places].tolist(),
        segments.causal.flatten()[places].tolist(),
        segments.moved.flatten()[places].tolist(),
        strict=True,
    )
    tokens = segments.tokens.flatten()[rows.canvas[own]].tolist()
    forward = list(zip(rows.position[own].tolist(), tokens, seen, strict=True))
    needed = plan.rows.needed[request].nonzero()[:, 0].tolist()

    def purpose(place: int) -> tuple[str, int]:
        if place < plan.num_next:
            return "next", place
        return ("guess", 0) if place >= plan.end_of_fill else ("canvas", place - plan.num_next)

    offsets = plan.rows.offset[request, needed].tolist()
    return forward, list(zip(map(purpose, needed), offsets, strict=True))


canvas = st.lists(st.sampled_from([KNOWN, MASK]), min_size=LENGTH, max_size=LENGTH)
one = st.fixed_dictionaries(
    {
        "tokens": st.one_of(canvas, st.just([KNOWN] * LENGTH)),
        "verifies": st.booleans(),
        "drafted": st.booleans(),  # as often as it asks for
        "fuses": st.booleans(),
        "guess": st.sampled_from([NO_TOKEN, 3]),
        "block": st.integers(1, 9),
        "inside": st.integers(0, LENGTH - 1),  # tokens of the prompt in its last block
    }
)


@given(requests=st.lists(one, min_size=1, max_size=3), block_causal=st.booleans())
def test_forwards_without_texts_or_without_canvases(
    requests: list[dict[str, Any]], block_causal: bool
) -> None:
    """Every mixture of canvases that are denoised, committed, verified, and denoised ahead."""
    family = SDAR if block_causal else NBDIFF
    verifies = [r["verifies"] and not block_causal for r in requests]
    fuses = [r["fuses"] and not own for r, own in zip(requests, verifies, strict=True)]
    columns = {
        "verifies": verifies,
        "fuses": fuses,
        "max_steps": [
            0 if own and r["drafted"] else 1 << 30
            for r, own in zip(requests, verifies, strict=True)
        ],
        "prompt_length": [r["block"] * LENGTH + r["inside"] for r in requests],
    }
    canvases = [r["tokens"] if block_causal else [KNOWN, *r["tokens"][1:]] for r in requests]
    facts = {"verifies": any(verifies), "fuses": any(fuses), "family": family}
    own, padded = (
        plan_of_batch(
            CanvasTable(len(requests), LENGTH, 16, torch.device("cpu")),
            [r["block"] * LENGTH for r in requests],
            canvases,
            [r["guess"] for r in requests],  # where a request does not fuse another one's
            page_size=16,
            room=200,
            facts=facts | {"static": static},
            columns=columns,
        )
        for static in (False, True)
    )
    for request in range(len(requests)):
        assert computed(own, request) == computed(padded, request)
    for field in ("text", "reads", "look", "ahead", "step"):
        assert getattr(own, field).tolist() == getattr(padded, field).tolist(), field
    assert not (own.ahead & ~own.options.fuses).any()
    rows = own.text + LENGTH * own.look.long()
    assert own.segments.length.sum(1).tolist() == rows.tolist()
    if not any(fuses):
        texts, looks = bool((own.text > 0).any()), bool((own.text == 0).any())
        assert own.rows.needed.shape[1] == own.num_next + (LENGTH if looks else 0)
        assert bool(own.num_next) == texts


def test_masks_of_a_prompt_stay_where_they_are() -> None:
    """Beside a neighbour that commits as without one, where blocks see all of themselves."""
    tail = [KNOWN, MASK, MASK, MASK]  # of a prompt whose last token is a mask

    def active(*canvases: list[int]) -> list[bool]:
        count = len(canvases)
        plan = plan_of_batch(
            CanvasTable(count, LENGTH, 16, torch.device("cpu")),
            [8] * count,
            list(canvases),
            [NO_TOKEN] * count,
            page_size=16,
            room=200,
            facts={"verifies": False, "fuses": True, "family": SDAR},
            columns={
                "prompt_length": [10] * count,
                "fuses": [True] * count,
                "verifies": [False] * count,
            },
        )
        columns: list[bool] = plan.canvases.active[0, 0].tolist()
        return columns

    assert active(tail) == active(tail, [KNOWN] * LENGTH) == [False, False, True, True]


def test_no_next_canvas_behind_a_text_that_ends() -> None:
    """Its request needs none: the first one has an end in it, and the second one none."""
    table = CanvasTable(2, LENGTH, 16, torch.device("cpu"))
    table.stops[:, 3] = True
    canvases = [[KNOWN, 3, KNOWN, KNOWN], [KNOWN] * LENGTH]
    facts = {"verifies": False, "fuses": True}
    own = {"fuses": [True] * 2, "verifies": [False] * 2, "max_steps": [1] * 2}
    plan = plan_of_batch(table, [8, 8], canvases, [3, 3], 16, 200, facts, own)
    assert plan.text.tolist() == [LENGTH] * 2
    assert plan.ends.tolist() == [True, False] and plan.ahead.tolist() == [False, True]
