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
