# SPDX-License-Identifier: Apache-2.0
"""FreeDave's drafts: which canvases are tried, which are right, where their KV lies."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_nbdiff.engine.canvas import NO_TOKEN
from vllm_nbdiff.engine.drafts import draft_room, last_right, nested, next_canvases
from vllm_nbdiff.engine.plan import Drafts
from vllm_nbdiff.engine.segments import Segments

MASK = 9


@st.composite
def proposals(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Canvases [B, L], proposals for some masked positions, their ranks, numbers of drafts."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))

    def array(values: st.SearchStrategy[int]) -> np.ndarray:
        drawn = draw(st.lists(values, min_size=batch * length, max_size=batch * length))
        return np.array(drawn).reshape(batch, length)

    canvas = array(st.sampled_from([1, 2, MASK, MASK, MASK]))
    proposed = np.where(canvas == MASK, array(st.sampled_from([3, 4, NO_TOKEN])), NO_TOKEN)
    # Few distinct values, so that ties occur.
    rank = array(st.integers(0, 3)) / 4
    count = [draw(st.integers(0, int(row.sum()))) for row in proposed != NO_TOKEN]
    return canvas, proposed, rank, np.array(count)


@given(proposals())
@settings(deadline=None)
def test_drafts_are_nested(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    canvas, proposed, rank, count = case
    owner, level, filled = nested(*case)
    expected = []
    for depth in range(1, int(count.max()) + 1):
        for b in np.flatnonzero(count >= depth).tolist():
            known = np.flatnonzero(proposed[b] != NO_TOKEN).tolist()
            best = sorted(known, key=lambda i: (-rank[b, i], i))[:depth]
            draft = canvas[b].copy()
            draft[best] = proposed[b, best]
            expected.append((b, depth, draft.tolist()))
    assert expected == list(zip(owner.tolist(), level.tolist(), filled.tolist(), strict=True))


@given(proposals(), st.data())
@settings(deadline=None)
def test_the_last_right_draft_is_that_of_the_paper(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    """repeat j' = max{m > j : draft_m == target_j} from the first draft, which is the canvas."""
    canvas, proposed, rank, _ = case
    owner, level, filled = nested(*case)
    drafts = Drafts(owner, level, filled, filled == MASK)
    lines = np.concatenate([canvas, filled])
    where = (lines == MASK).nonzero()
    # Mostly what was proposed, so that long runs of drafts are right.
    token = data.draw(st.lists(st.sampled_from([3, 4, MASK]), min_size=1, max_size=400))
    chance = data.draw(st.lists(st.sampled_from([0.0, 0.25]), min_size=1, max_size=400))
    line_owner = np.concatenate([np.arange(len(canvas)), owner])[where[0]]
    hint = proposed[line_owner, where[1]]
    likely = rank[line_owner, where[1]] + np.resize(chance, len(hint)) * (hint == NO_TOKEN)
    token = np.where(hint == NO_TOKEN, np.resize(token, len(hint)), hint)
    target = next_canvases(lines, lines == MASK, where, token, likely.astype(np.float32))

    for i, line in enumerate(lines):
        masked = np.flatnonzero(line == MASK).tolist()
        step = line.copy()
        if masked:
            index = {int(c): k for k, c in enumerate(where[1]) if where[0][k] == i}
            best = min(masked, key=lambda c: (-np.float32(likely[index[c]]), c))
            step[best] = token[index[best]]
        assert step.tolist() == target[i].tolist()

    last = last_right(target, len(canvas), drafts)
    for b in range(len(canvas)):
        chain = [b, *(len(canvas) + np.flatnonzero(owner == b)).tolist()]
        j = 0
        while matches := [
            m for m in range(j + 1, len(chain)) if (lines[chain[m]] == target[chain[j]]).all()
        ]:
            j = max(matches)
        assert last[b] == chain[j]


@given(
    st.integers(0, 300), st.integers(1, 64), st.integers(0, 9), st.sampled_from([1, 16, 32, 128])
)
def test_versions_of_a_canvas_have_pages_of_their_own(
    start: int, width: int, num_drafts: int, page_size: int
) -> None:
    versions = np.arange(num_drafts + 1)
    same = np.ones_like(versions)
    segments = Segments(
        owner=0 * same,
        first=start * same,
        length=width * same,
        kv_length=(start + width) * same,
        causal=np.zeros(len(same), np.bool_),
        version=versions,
    )
    first, count = segments.pages(page_size)
    pages = [
        range(f + v * n, f + (v + 1) * n) for f, v, n in zip(first, versions, count, strict=True)
    ]
    used = [page for version in pages for page in version]
    assert len(set(used)) == len(used)
    assert list(pages[0]) == sorted({p // page_size for p in range(start, start + width)})
    end = start + width + draft_room(num_drafts, width, page_size)
    assert max(used) < -(-end // page_size)
