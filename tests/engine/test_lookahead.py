# SPDX-License-Identifier: Apache-2.0
"""What a schedule gives one request: tokens, and pages behind them."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_nbdiff.engine.lookahead import canvas_tokens, lookahead_tokens
from vllm_nbdiff.request import RequestOptions

L = 32
STATIC: Any = SimpleNamespace(static_shapes=True, block_length=L)
LOOPED: Any = SimpleNamespace(static_shapes=False, block_length=L)


@pytest.mark.parametrize(
    ("extra", "static", "looped"),
    [
        ({}, L, L),
        ({"block_length": 8, "small_blocks": 1}, 8, 8),
        ({"fused_commit": True}, 2 * L, L),
        ({"algorithm": "freedave", "draft_steps": 4}, 4 * L, L),
        ({"mode": "ar"}, 1, L),
        ({"mode": "ar", "fused_commit": True}, 1, L),
        ({"mode": "verify", "draft_length": 12}, 12, L),
        ({"mode": "verify", "draft_length": 12, "fused_commit": True}, 24, L),
        ({"mode": "auto"}, L, L),
    ],
    ids=str,
)
def test_canvas_tokens(extra: dict[str, Any], static: int, looped: int) -> None:
    """The rows of the largest forward where that is a schedule, else what it may emit."""
    request = RequestOptions(**{"block_length": L, "small_blocks": 1} | extra)
    assert canvas_tokens(request, STATIC, limit=4 * L) == static
    assert canvas_tokens(request, LOOPED, limit=4 * L) == looped
    # With one row less, something of it is left out, and what remains is whole canvases.
    smaller = canvas_tokens(request, STATIC, limit=max(static - 1, L))
    assert smaller == static or smaller in (L, 2 * L, 3 * L, 12)


@pytest.mark.parametrize("page_size", [1, 16, 20, 32, 128])
@pytest.mark.parametrize("config", [STATIC, LOOPED])
def test_lookahead_holds_every_version_of_the_canvas(config: Any, page_size: int) -> None:
    """Wherever the canvas begins: its own pages, and as many for each draft."""
    for steps in (1, 2, 5):
        request = RequestOptions("freedave", 1.0, 1, L, draft_steps=steps)
        behind = lookahead_tokens(request, config, page_size, limit=5 * L)
        end = canvas_tokens(request, config, limit=5 * L) + behind
        for start in range(2 * page_size):
            versions = steps * (-(-(start + L) // page_size) - start // page_size)
            assert -(-(start + end) // page_size) - start // page_size >= versions
    plain = RequestOptions(small_blocks=4, block_length=L)
    assert lookahead_tokens(plain, config, page_size, limit=5 * L) == 0
