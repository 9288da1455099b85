# SPDX-License-Identifier: Apache-2.0
"""Time that an engine's worker spends in the bare model: forward, and logits of the chosen rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_nbdiff.engine.chooser import Limits

if TYPE_CHECKING:
    from vllm_nbdiff.decoding.plan import Plan
    from vllm_nbdiff.decoding.rows import Packed
    from vllm_nbdiff.decoding.sampling import Drawn
    from vllm_nbdiff.engine.schedule import Schedule


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
        """Replace what verification reads from the logits: a drafted token is right by chance.

        A wrong one is answered with token 0 or 1; neither may be the mask. Drafts say that chance
        of themselves.
        """
        sampler = self.model_runner.model_state.loop.decoder.sampler
        draw, random = sampler.draw, torch.Generator().manual_seed(0)

        def forced(logits: Tensor, plan: Plan, packed: Packed, schedule: Schedule) -> Drawn:
            drawn = draw(logits, plan, packed, schedule)
            owner, column = packed.owner, packed.place
            verified = plan.options.verifies[owner] & (column < plan.num_next)
            verified &= column + 1 < plan.text[owner]
            tokens = plan.state.tokens
            drafted = tokens[owner, (column + 1).clamp(max=tokens.shape[1] - 1)]
            right = torch.rand(len(owner), generator=random) < chance
            token = torch.where(right.to(owner.device), drafted, (drafted == 0).long())
            drafts = plan.options.verifies[owner] & (column >= plan.num_next)
            return drawn._replace(
                token=torch.where(verified, token, drawn.token),
                probability=torch.where(drafts, chance, drawn.probability),
            )

        sampler.draw = forced

    def set_adaptive(self, adaptive: bool) -> None:
        """Whether what is verified and drafted follows what it costs, as it does by default."""
        model_state = self.model_runner.model_state
        model_state.loop.auto.sets_limits = adaptive
        table, everything = model_state.options, Limits(0.0, 0.0)
        table.set_limits(np.arange(len(table.is_auto)), *everything)

    @torch.inference_mode()
    def time_rows(self, rows: int, repeats: int = 5) -> float:
        """Least seconds of the model's forward and logits on so many rows, without attention."""
        from vllm.forward_context import set_forward_context

        runner, times = self.model_runner, []
        ids = torch.zeros(rows, dtype=torch.int32, device=runner.device)
        positions = torch.arange(rows, device=runner.device)
        for _ in range(repeats):
            start = perf_counter()
            with set_forward_context(None, runner.vllm_config, num_tokens=rows):
                runner.model.compute_logits(runner.model(input_ids=ids, positions=positions))
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
