# SPDX-License-Identifier: Apache-2.0
"""What a denoise step fills."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.decoding.plans import MASK
from vllm_nbdiff.decoding.decide import Proposal, choose
from vllm_nbdiff.decoding.plan import Facts
from vllm_nbdiff.decoding.rules import RULES

LENGTH = 4
column = st.tuples(st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@given(
    canvases=st.lists(st.lists(column, min_size=LENGTH, max_size=LENGTH), min_size=1, max_size=3),
    quota=st.lists(st.integers(1, LENGTH), min_size=3, max_size=3),
    looked=st.lists(st.booleans(), min_size=3, max_size=3),
    name=st.sampled_from(["confidence", "entropy", "factor", "entropy_bound", "sequential"]),
)
def test_what_is_due_is_filled_by_whatever_rule(
    canvases: list[list[tuple[bool, float]]], quota: list[int], looked: list[bool], name: str
) -> None:
    """A CPU does not rank columns all of which are due; one that has no confidence ranks last."""
    count, place = len(canvases), list(RULES).index(name)
    active = torch.tensor([[own for own, _ in row] for row in canvases])
    chance = torch.tensor([[own for _, own in row] for row in canvases])
    plan: Any = SimpleNamespace(
        options=SimpleNamespace(
            rule=torch.full((count,), place), threshold=torch.full((count,), 0.3)
        ),
        quota=torch.tensor(quota[:count]),
    )
    tokens = torch.full((count, LENGTH), MASK)
    proposal = Proposal(tokens, active, tokens - 1, chance, chance.log())
    own, ranked = (
        choose(plan, proposal, torch.tensor(looked[:count]), Facts(MASK, 0, 16, (place,), static))
        for static in (False, True)
    )
    assert own.tolist() == ranked.tolist()
