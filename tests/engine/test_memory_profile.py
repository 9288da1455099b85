# SPDX-License-Identifier: Apache-2.0
"""What vLLM's memory profile sees of a step."""

from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_nbdiff.engine.decided import NBDiffSampler


class Largest(TorchFunctionMode):
    """Notes the largest tensor that is made."""

    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numel = max(self.numel, made.numel())
        return made


def test_logits_of_every_canvas_are_profiled() -> None:
    """The dummy batch has a row of logits for each request, a step a block of them."""
    dummy: Any = SimpleNamespace(num_draft_tokens_per_req=None, num_reqs=3)
    loop: Any = None
    for rows in (0, 96):
        with Largest() as largest:
            output = NBDiffSampler(loop, False, rows)(torch.zeros(3, 50), dummy)
        assert largest.numel == max(rows, 3) * 50
        assert output.sampled_token_ids.shape == (3, 1)
