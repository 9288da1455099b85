# SPDX-License-Identifier: Apache-2.0
"""Time that an engine's worker spends in the bare model: forward, and logits of the chosen rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vllm_nbdiff.engine.plan import NEXT


@dataclass
class Clock:
    """Calls of one function and the seconds spent in them."""

    calls: int = 0
    seconds: float = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted; costs well under a microsecond a call."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += perf_counter() - start
                self.calls += 1

        return call


class ForwardTimer:
    """vLLM's `worker_extension_cls`: methods for `LLM.collective_rpc`.

    Host time, so it is the model's time only where the device is the CPU.
    """

    model_runner: Any

    def start_forward_timer(self) -> None:
        """Wrap `forward` and `compute_logits` of the worker's model, once."""
        model = self.model_runner.model
        self._forward_clock, self._logits_clock = Clock(), Clock()
        model.forward = self._forward_clock.timed(model.forward)
        model.compute_logits = self._logits_clock.timed(model.compute_logits)

    def force_acceptance(self, chance: float) -> None:
        """Replace what verification reads from the logits: a drafted token is right by chance."""
        decoder = self.model_runner.model_state.decoder
        state, draw = decoder.state, decoder.sampler.draw
        random = np.random.default_rng(0)

        def forced(logits: Any, batch: Any, plan: Any) -> Any:
            drawn, rows = draw(logits, batch, plan), plan.rows
            drafted = (rows.kind == NEXT) & (rows.column + 1 < plan.text[rows.owner])
            chosen = np.flatnonzero(drafted)
            slots = batch.slots[rows.owner[chosen]]
            wrong = random.random(len(chosen)) >= chance
            token = drawn.token.copy()
            drafts = state.tokens[slots, rows.column[chosen] + 1]
            token[chosen] = np.where(wrong, (drafts + 1) % state.config.vocab_size, drafts)
            return replace(drawn, token=token)

        decoder.sampler.draw = forced

    def time_rows(self, rows: int, repeats: int = 5) -> float:
        """Least seconds of the model's forward and logits on so many rows, without attention."""
        run, times = self.model_runner.model_state.loop.run_rows, []
        for _ in range(repeats):
            start = perf_counter()
            run(rows)
            times.append(perf_counter() - start)
        return min(times)

    def time_matmul(self, rows: int, repeats: int = 5) -> tuple[float, float]:
        """Least seconds of a large matrix product of the model's dtype, and its FLOP."""
        dtype = self.model_runner.model_config.dtype
        x, weight = torch.randn(rows, 768, dtype=dtype), torch.randn(4096, 768, dtype=dtype)
        times = []
        for _ in range(repeats):
            start = perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(perf_counter() - start)
        return min(times), 2.0 * rows * weight.numel()

    def read_forward_timer(self) -> float:
        """Seconds in the model since the timer was started."""
        return self._forward_clock.seconds + self._logits_clock.seconds
