# SPDX-License-Identifier: Apache-2.0
"""Which step filled a column, from the canvases before and after a forward."""

from types import SimpleNamespace
from typing import Any

import torch

from vllm_nbdiff.decoding.step_map import filled_now

M = 511


def test_versions_and_edits() -> None:
    """Columns that versions fill have a step each; the last change of a column counts."""
    canvas = torch.tensor([[[1, M, 2, M, M], [1, M, 2, 5, M], [1, 6, 2, 5, M]]]).repeat(2, 1, 1)
    plan: Any = SimpleNamespace(
        step=torch.tensor([4, 4]),
        canvases=SimpleNamespace(tokens=canvas),
        reads=torch.tensor([False, True]),
    )
    after: Any = SimpleNamespace(tokens=torch.tensor([[1, 6, 3, 5, 7], [1, M, 2, M, 8]]))
    step, new = filled_now(plan, after, torch.tensor([True, True]), torch.tensor([2, 0]), M)
    assert step.tolist() == [[-1, 5, 4, 4, 6], [-1, -1, -1, -1, 4]]
    assert new.tolist() == [[False, True, True, True, True], [True] * 5]
