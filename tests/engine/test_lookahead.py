# SPDX-License-Identifier: Apache-2.0
"""What a schedule gives one request: tokens, and pages behind them."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_nbdiff.engine.lookahead import Share, canvas_tokens, lookahead_tokens
from vllm_nbdiff.families.family import NBDIFF, NEMOTRON
from vllm_nbdiff.request_options import RequestOptions

L = 32
STATIC: Any = SimpleNamespace(static_shapes=True, block_length=L, family=NBDIFF)
LOOPED: Any = SimpleNamespace(static_shapes=False, block_length=L, family=NBDIFF)


@pytest.mark.parametrize(
    ("extra", "static", "looped"),
    [
        ({}, (L, L), (L, 2 * L)),
        ({"block_length": 8, "small_blocks": 1}, (8, 8), (8, 2 * L)),
        ({"fused_commit": True}, (2 * L, 2 * L), (L, 2 * L)),
        ({"algorithm": "freedave", "draft_steps": 4}, (4 * L, 4 * L), (L, 2 * L)),
        ({"mode": "ar"}, (1, 1), (L, 2 * L)),
        ({"mode": "ar", "fused_commit": True}, (1, 1), (L, 2 * L)),
        ({"mode": "verify", "draft_length": 12, "fan_out": 0}, (12, 12), (L, 2 * L)),
        ({"mode": "verify", "draft_length": 12, "fan_out": 2}, (12, 36), (L, 2 * L)),
        ({"mode": "verify", "draft_length": 12, "fused_commit": True}, (24, 24), (L, 2 * L)),
        ({"mode": "auto"}, (L, L), (L, 2 * L)),
    ],
    ids=str,
)
def test_canvas_tokens(
    extra: dict[str, Any], static: tuple[int, int], looped: tuple[int, int]
) -> None:
    """The rows of the largest forward where that is a schedule, else what it may emit."""
    request = RequestOptions(**{"block_length": L, "small_blocks": 1} | extra)
    assert canvas_tokens(request, STATIC, limit=4 * L) == static
    assert canvas_tokens(request, LOOPED, limit=4 * L) == looped
    # With one row less, something of it is left out, and what remains is whole canvases.
    smaller = canvas_tokens(request, STATIC, limit=max(static[1] - 1, L))
    assert smaller == static or smaller.most in (L, 2 * L, 3 * L, 12, 24)


@pytest.mark.parametrize(("extra", "most"), [({}, L), ({"mode": "verify"}, 2 * L)], ids=str)
def test_a_stream_waits_for_no_second_block_of_many_steps(extra: dict[str, Any], most: int) -> None:
    request = RequestOptions(**{"block_length": L, "small_blocks": 1} | extra)
    assert canvas_tokens(request, LOOPED, limit=4 * L, streams=True) == (L, most)


def test_a_known_token_and_the_canvas_behind_it_fit() -> None:
    """Where a row predicts its own position the canvas has a row more; never above the limit."""
    config: Any = SimpleNamespace(static_shapes=True, block_length=L, family=NEMOTRON)
    request = RequestOptions(mode="verify", draft_length=12, fan_out=3, block_length=L)
    assert canvas_tokens(request, config, limit=4 * L) == (13, 52)
    assert canvas_tokens(request, config, limit=12) == (12, 12)


def test_canvases_share_what_there_is() -> None:
    share = Share(12, 60)
    assert [share.of(own) for own in (0, 12, 23, 24, 59, 60, 999)] == [12, 12, 12, 24, 48, 60, 60]


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("config", [STATIC, LOOPED])
def test_lookahead_holds_drafts_for_break_points(config: Any, page_size: int) -> None:
    """Where canvases do not cross the end of a page, whatever part of a schedule is done."""
    request = RequestOptions(mode="verify", fan_out=3, block_length=L)
    width, limit = request.draft_width, 8 * L
    behind = lookahead_tokens(request, config, page_size, limit)
    for start in range(0, 2 * page_size, page_size):
        end = start + canvas_tokens(request, config, limit).least + behind
        text_end = start + (width if config is STATIC else L)
        own = 3 * -(-width // page_size)
        assert -(-(text_end + width) // page_size) + own <= -(-end // page_size)


@pytest.mark.parametrize("page_size", [1, 16, 20, 32, 128])
@pytest.mark.parametrize("config", [STATIC, LOOPED])
def test_lookahead_holds_every_version_of_the_canvas(config: Any, page_size: int) -> None:
    """Wherever the canvas begins: its own pages, and as many for each draft."""
    for steps in (1, 2, 5):
        request = RequestOptions("freedave", 1.0, 1, L, draft_steps=steps)
        behind = lookahead_tokens(request, config, page_size, limit=5 * L)
        end = canvas_tokens(request, config, limit=5 * L).least + behind
        for start in range(2 * page_size):
            versions = steps * (-(-(start + L) // page_size) - start // page_size)
            assert -(-(start + end) // page_size) - start // page_size >= versions
    plain = RequestOptions(small_blocks=4, block_length=L)
    assert lookahead_tokens(plain, config, page_size, limit=5 * L) == 0
