# SPDX-License-Identifier: Apache-2.0
"""Step maps on the way from the scheduler to a `CompletionOutput`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_nbdiff.compat.patching import patch

if TYPE_CHECKING:
    from vllm.v1.outputs import SamplingMaskLists

# Steps are at least -1. No token id is negative, so that these are told from masks of tokens.
_FIRST = -2


def pack_steps(steps: np.ndarray) -> SamplingMaskLists:
    """The steps [n] of n tokens as vLLM carries numbers for each token."""
    from vllm.v1.outputs import SamplingMaskLists

    return SamplingMaskLists(_FIRST - steps, np.arange(len(steps) + 1))


def give_step_maps() -> None:
    """Have a `CompletionOutput` say `step_map`: of each of its tokens, or None.

    Symptom: an engine's output has no field of a model's own. Sampling masks, which our models do
    not have, are numbers for each token that are cut, streamed and kept together with the tokens;
    here steps are taken out of them.
    Upstream: `AsyncOutput.get_output` (vllm/v1/worker/gpu/async_utils.py),
    `Scheduler.update_from_output` (vllm/v1/core/sched/scheduler.py), `EngineCoreOutput`
    (vllm/v1/engine/__init__.py), `RequestState._new_completion_output`
    (vllm/v1/engine/output_processor.py), `RequestOutput.add`, `CompletionOutput` (vllm/outputs.py).
    Remove when a model may add numbers for each token to its output.
    """
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.output_processor import RequestState

    setattr(CompletionOutput, "step_map", None)  # noqa: B010 (no attribute of vLLM's)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def made(self: Any, *args: Any, **kwargs: Any) -> Any:
            # The original forgets what it gives.
            chunks = list(self.sampling_mask_chunks)
            output = original(self, *args, **kwargs)
            if chunks:
                numbers = np.concatenate([chunk.token_ids for chunk in chunks])
                if len(numbers) and numbers[0] < 0:
                    output.step_map, output.sampling_mask = (_FIRST - numbers).tolist(), None
            return output

        return made

    def merge(original: Callable[..., None]) -> Callable[..., None]:
        def added(self: Any, next_output: Any, aggregate: bool) -> None:
            for new in next_output.outputs if aggregate else ():
                if new.step_map is not None:
                    for own in self.outputs:
                        if own.index == new.index:
                            own.step_map = [*(own.step_map or ()), *new.step_map]
            original(self, next_output, aggregate)

        return added

    patch(RequestState, "_new_completion_output", make)
    patch(RequestOutput, "add", merge)
