# SPDX-License-Identifier: Apache-2.0
"""Step maps of requests that ask, from the forward that fills a position to the one that emits it,
and on to the scheduler.

They travel as vLLM's sampling masks do, which are not supported here (startup.py): numbers for each
token, which vLLM cuts, streams and merges together with the tokens. `compat/step_map.py` takes them
out at the other end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import SamplingMaskLists

from vllm_nbdiff import compat
from vllm_nbdiff.decoding.canvas import Canvas, Options
from vllm_nbdiff.decoding.logprobs import Filled
from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.step_map import NO_STEP, filled_now
from vllm_nbdiff.engine.schedule import Schedule


class StepTable:
    """The steps that filled positions which are not emitted yet, by slot and position.

    A request has room for the positions of four blocks; the place of a position is its remainder.
    """

    def __init__(self, num_slots: int, length: int, device: torch.device) -> None:
        """
        Args:
            num_slots: largest number of requests.
            length: L, the served block length.
            device: of the model.
        """
        self._wanted = np.zeros(num_slots + 1, np.bool_)
        self._asking = np.zeros(0, np.int64)
        # A spare slot takes what is not new.
        self._step = torch.full((num_slots + 1, 4 * length), NO_STEP, device=device)

    def add_request(self, slot: int, wanted: bool) -> None:
        """Set whether a request asks for its step map."""
        self._wanted[slot] = wanted

    @property
    def asked(self) -> bool:
        """Whether a request of the schedule asks."""
        return len(self._asking) > 0

    def begin(self, schedule: Schedule, options: Options, first: Callable[[], Tensor]) -> None:
        """Take the batch of a schedule; `first` gives the positions [B] int64 of the first tokens
        that it may emit, for which nothing is computed unless some request asks."""
        self._asking = np.flatnonzero(self._wanted[schedule.slots])
        if self.asked:
            self._schedule, self._options, self._first = schedule, options, first()

    def record(self, plan: Plan, state: Canvas, looked: Tensor, filled: Filled | None) -> None:
        """Keep what a forward filled.

        Args:
            plan: of the forward.
            state: after it.
            looked: [B] bool, canvases that were denoised.
            filled: None: no canvas was.
        """
        batch, mask = self._schedule.batch, self._schedule.facts.mask_token_id
        level = None if filled is None else filled.level
        step, new = filled_now(plan, state, looked, level, mask)
        spare, size = self._step.shape[0] - 1, self._step.shape[1]
        columns = torch.arange(step.shape[1], device=step.device)
        slot = torch.where(new, batch.slot[:, None], spare)
        self._step[slot, (state.start[:, None] + columns) % size] = step

    def collect(self, most: int) -> StepMaps | None:
        """The steps of the `most` tokens that each request may have emitted; None: no one asks.

        Where text is that of AR decoding, the place in the text.
        """
        if not self.asked:
            return None
        who = async_tensor_h2d(self._asking, device=self._step.device)
        slot, options = self._schedule.batch.slot[who][:, None], self._options
        position = self._first[who][:, None] + torch.arange(most, device=who.device)
        step = torch.where(
            options.verifies[who][:, None],
            position - options.prompt_length[who][:, None],
            self._step[slot, position % self._step.shape[1]],
        )
        return StepMaps({request: row for row, request in enumerate(self._asking.tolist())}, step)


class StepLists(NamedTuple):
    """Of the requests of a schedule that ask, on the way to the scheduler."""

    rows: dict[int, int]  # by batch index
    steps: np.ndarray  # [n, E] int64

    def slice_request(self, req_idx: int, num_positions: int) -> SamplingMaskLists | None:
        """What goes to the front end with the first tokens of a request; None: it does not ask."""
        row = self.rows.get(req_idx)
        return None if row is None else compat.pack_steps(self.steps[row, :num_positions])


class StepMaps(NamedTuple):
    """The same on the model's device, in place of vLLM's `SamplingMaskTensors`."""

    rows: dict[int, int]
    steps: Tensor

    def to_cpu_nonblocking(self) -> StepMaps:
        """The same on the host, once the copies are waited for."""
        return StepMaps(self.rows, self.steps.to("cpu", non_blocking=True))

    def tolists(self, num_sampled_tokens: np.ndarray | None = None) -> StepLists:
        """What goes to the scheduler."""
        return StepLists(self.rows, self.steps.numpy())
