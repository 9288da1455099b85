# SPDX-License-Identifier: Apache-2.0
"""What vLLM's memory profile sees of a step."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from vllm import SamplingParams

from tests.conftest import options
from vllm_nbdiff.engine.decided import NBDiffSampler

ROWS = 256


class Made(TorchFunctionMode):
    """Counts the bytes of what is made."""

    nbytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.nbytes += made.nbytes
        return made


def test_logits_of_every_canvas_are_profiled() -> None:
    """The dummy batch has a row of logits for each request, a step a block of them, and a float32
    copy of those whose tokens are constrained."""
    dummy: Any = SimpleNamespace(num_draft_tokens_per_req=None, num_reqs=3)
    loop: Any = None
    logits = torch.zeros(3, 50, dtype=torch.bfloat16)
    for rows in (0, 96):
        with Made() as made:
            output = NBDiffSampler(loop, False, rows)(logits, dummy)
        tokens = 3 * (4 + 4 + 8)
        assert made.nbytes == rows * 50 * (2 + 4) + tokens
        assert output.sampled_token_ids.shape == (3, 1)


@pytest.mark.parametrize(
    "extra",
    [
        options(algorithm="freedave", draft_steps=9),
        options(mode="verify", fused_commit=1, draft_length=8),
        options(mode="verify", fan_out=8),
    ],
    ids=str,
)
def test_one_request_does_not_pad_all_others(static: Any, extra: dict[str, Any]) -> None:
    """Rows of logits are those of the request with most, times the batch: within its rows."""
    worker = static.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model, counts = worker.model_runner.model, []
    compute = model.compute_logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        counts.append(len(hidden))
        return compute(hidden)

    params = [
        SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, extra_args=own
        )
        for own in [extra] + 15 * [{}]
    ]
    prompts = [{"prompt_token_ids": [5, 6, 7, i]} for i in range(16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "compute_logits", counted)
        static.generate(prompts, params, use_tqdm=False)
    assert 0 < max(counts) <= ROWS + 16  # a guessed seed each
    assert max(counts) <= worker.model_runner.sampler.most_rows


@pytest.fixture(scope="module")
def static(golden_checkpoint: Path, make_llm: Callable[..., Any]) -> Any:
    shapes = {"nbdiff": {"static_shapes": True}}
    return make_llm(
        golden_checkpoint, max_num_batched_tokens=ROWS, max_num_seqs=16, additional_config=shapes
    )
