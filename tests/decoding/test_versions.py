# SPDX-License-Identifier: Apache-2.0
"""FreeDave's versions of a canvas: which are tried, which are right, where their KV lies."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.decoding.plans import MASK, plan_of, seen_by_segments
from vllm_nbdiff.decoding.canvas import NO_TOKEN
from vllm_nbdiff.decoding.versions import last_right, nested
from vllm_nbdiff.engine.lookahead import draft_room


@st.composite
def proposals(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Canvases [B, L], proposals for some masked positions, their ranks, a number of versions."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))

    def tensor(values: st.SearchStrategy[int]) -> torch.Tensor:
        drawn = draw(st.lists(values, min_size=batch * length, max_size=batch * length))
        return torch.tensor(drawn).view(batch, length)

    canvas = tensor(st.sampled_from([1, 2, MASK, MASK, MASK]))
    proposed = torch.where(canvas == MASK, tensor(st.sampled_from([3, 4, NO_TOKEN])), NO_TOKEN)
    # Few distinct values, so that ties occur.
    rank = tensor(st.integers(0, 3)) / 4
    return canvas, proposed, rank, draw(st.integers(0, length))


@given(proposals())
def test_versions_are_nested(case: tuple[Any, Any, Any, int]) -> None:
    canvas, proposed, rank, count = case
    shown = nested(*case)
    for b in range(len(canvas)):
        known = (proposed[b] != NO_TOKEN).nonzero()[:, 0].tolist()
        best = sorted(known, key=lambda i: (-float(rank[b, i]), i))
        for level in range(count + 1):
            expected = canvas[b].clone()
            expected[best[:level]] = proposed[b, best[:level]]
            assert shown[b, level].tolist() == expected.tolist()


@given(proposals(), st.data())
def test_the_last_right_version_is_that_of_the_paper(
    case: tuple[Any, Any, Any, int], data: st.DataObject
) -> None:
    """repeat j' = max{m > j : draft_m == target_j} from the first draft, which is the canvas."""
    _, proposed, rank, count = case
    shown = nested(*case)
    given_ = (proposed != NO_TOKEN).sum(1)
    exists = torch.arange(count + 1) <= given_[:, None]
    active = (shown == MASK) & exists[:, :, None]
    # Mostly what was proposed, so that long runs of versions are right.
    size = shown.numel()
    token = data.draw(st.lists(st.sampled_from([3, 4, MASK]), min_size=size, max_size=size))
    hint = proposed[:, None].expand(shown.shape)
    predicted = torch.where(hint == NO_TOKEN, torch.tensor(token).view(shown.shape), hint)
    bonus = data.draw(st.lists(st.sampled_from([0.0, 0.25]), min_size=size, max_size=size))
    confidence = rank[:, None] + torch.tensor(bonus).view(shown.shape) * (hint == NO_TOKEN)
    last = last_right(shown, exists, active, predicted, confidence)
    for b in range(len(shown)):
        chain = [shown[b, level].tolist() for level in range(int(exists[b].sum()))]
        targets = []
        for level, line in enumerate(chain):
            masked = [i for i, t in enumerate(line) if t == MASK]
            target = list(line)
            if masked:
                best = min(masked, key=lambda i: (-float(confidence[b, level, i]), i))
                target[best] = int(predicted[b, level, best])
            targets.append(target)
        j = 0
        while matches := [m for m in range(j + 1, len(chain)) if chain[m] == targets[j]]:
            # Versions of the same filling follow one another.
            j = matches[0]
        assert int(last[b]) == j


@given(
    st.integers(0, 300), st.integers(2, 64), st.integers(0, 9), st.sampled_from([1, 16, 32, 128]),
    st.booleans(),
)  # fmt: skip
def test_versions_see_the_text_and_themselves(
    start: int, width: int, count: int, page_size: int, static: bool
) -> None:
    """And have pages for as many as were asked for."""
    room = start + width + draft_room(count, width, page_size)
    plan = plan_of(
        start, [1] + [MASK] * (width - 1), page_size, room, {"versions": count, "verifies": False},
        [0.0] * width, [NO_TOKEN] + [3] * (width - 1), max_versions=count,
    )  # fmt: skip
    levels = min(count, width - 2) + 1
    assert plan.canvases.exists[0].tolist() == [level < levels for level in range(count + 1)]
    pages = -(-room // page_size)
    text = [(position, "text") for position in range(start)]
    for level, seen in enumerate(seen_by_segments(plan, page_size, pages, static)):
        assert seen == text + [(start + column, str(level)) for column in range(width)]
