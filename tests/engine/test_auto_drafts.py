# SPDX-License-Identifier: Apache-2.0
"""What a batch asks the chooser of mode `auto`."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_nbdiff.engine.auto import AutoDrafts


def test_requests_whose_prompts_are_read_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their first canvases begin with this schedule, and are as wide as is chosen for all."""
    asked: list[int] = []

    def choose(num_requests: int, other_rows: int, fan_out: int) -> int:
        asked.append(num_requests)
        return 1

    options: Any = SimpleNamespace(
        config=SimpleNamespace(block_length=32),
        is_auto=np.ones(64, np.bool_),
        host=defaultdict(lambda: np.zeros(64, np.int64)),
        set_draft_length=lambda slots, length: None,
        set_limits=lambda slots, chance, survival: None,
    )
    drafts = AutoDrafts(options, 16, 0.1, static=False, agree=lambda values: values)
    monkeypatch.setattr(drafts.chooser, "choose", choose)
    schedule: Any = SimpleNamespace(slots=np.arange(64), scheduled=np.full(64, 32))
    for schedule.decodes in (np.arange(64) < 0, np.arange(64) < 3):
        drafts.begin_schedule(schedule)
    assert asked == [64, 64]


@pytest.mark.parametrize(("static", "rows"), [(False, 3 * 1 + 2 * 16), (True, 5 * 64)])
def test_requests_beside_count_by_their_rows(
    monkeypatch: pytest.MonkeyPatch, static: bool, rows: int
) -> None:
    """Not by the tokens that are scheduled for what their forwards may emit, unless these are
    rows."""
    asked: list[int] = []

    def choose(num_requests: int, other_rows: int, fan_out: int) -> int:
        asked.append(other_rows)
        return 1

    host = defaultdict(lambda: np.zeros(6, np.int64))
    host["block_length"] = np.array([32, 1, 1, 1, 16, 16])
    options: Any = SimpleNamespace(
        config=SimpleNamespace(block_length=32),
        is_auto=np.arange(6) == 0,
        host=host,
        set_draft_length=lambda slots, length: None,
    )
    drafts = AutoDrafts(options, 16, 0.1, static=static, agree=lambda values: values)
    monkeypatch.setattr(drafts.chooser, "choose", choose)
    schedule: Any = SimpleNamespace(
        slots=np.arange(6), scheduled=np.full(6, 64), decodes=np.ones(6, np.bool_)
    )
    drafts.begin_schedule(schedule)
    assert asked == [rows]
