# SPDX-License-Identifier: Apache-2.0
"""What a CPU leaves out of a plan, where nothing of the kind is there, changes nothing."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.decoding.plans import MASK, plan_of
from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.rows import token_rows

LENGTH = 8


def computed(plan: Plan) -> tuple[list[Any], list[Any]]:
    """Rows of the forward, each with what it sees, and what is predicted from which row."""
    segments = plan.segments
    rows = token_rows(segments, None)
    seen = [
        (int(segments.kv_length.flatten()[place]), bool(segments.causal.flatten()[place]))
        for place in rows.segment.tolist()
    ]
    tokens = segments.tokens.flatten()[rows.canvas].tolist()
    places = plan.rows.needed[0].nonzero()[:, 0].tolist()
    offsets = plan.rows.offset[0, places].tolist()
    predicted = [
        ("next", place) if place < plan.num_next else ("canvas", place - plan.num_next)
        for place in places
    ]
    forward = list(zip(rows.position.tolist(), tokens, seen, strict=True))
    return forward, list(zip(predicted, offsets, strict=True))


@given(
    tokens=st.lists(st.sampled_from([3, MASK]), min_size=LENGTH - 1, max_size=LENGTH - 1),
    verifies=st.booleans(),
    others_verify=st.booleans(),
    max_steps=st.sampled_from([0, 1, 1 << 30]),
    fuses=st.booleans(),
    start=st.integers(0, 40),
)
def test_forwards_without_texts_or_without_canvases(
    tokens: list[int],
    verifies: bool,
    others_verify: bool,
    max_steps: int,
    fuses: bool,
    start: int,
) -> None:
    """`max_steps` 0: a draft is done and its text is verified."""
    facts = {"verifies": verifies or others_verify, "fuses": fuses}
    options = {"verifies": verifies, "max_steps": max_steps if verifies else 1 << 30}
    options["fuses"] = fuses and not verifies
    plans = [
        plan_of(start, [5, *tokens], 16, 200, facts | {"static": static}, **options)
        for static in (False, True)
    ]
    own, padded = plans
    assert computed(own) == computed(padded)
    if not fuses:
        assert own.num_next in (0, own.rows.needed.shape[1])
    for field in ("text", "reads", "look", "ahead", "step"):
        assert getattr(own, field).tolist() == getattr(padded, field).tolist(), field
