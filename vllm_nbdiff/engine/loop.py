# SPDX-License-Identifier: Apache-2.0
"""The forwards of one schedule, which ends when the scheduler has something to decide."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from vllm_nbdiff.engine.auto import CostModel, WidthChooser
from vllm_nbdiff.engine.decoder import Decoder, Emitted
from vllm_nbdiff.engine.drafts import add_drafts
from vllm_nbdiff.engine.plan import Batch, Plan, make_plan
from vllm_nbdiff.engine.segments import PagedBatch, SegmentForward, Segments


class ForwardLoop:
    """Plans forwards of the scheduled batch, runs them and has them decided."""

    batch: Batch
    plan: Plan
    _paged: PagedBatch
    _planned: SegmentForward | None

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        vllm_config: VllmConfig,
        device: torch.device,
        steps_per_schedule: int,
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.canvas = decoder.state
        self.vllm_config = vllm_config
        self.device = device
        self.steps_per_schedule = steps_per_schedule
        # The runner's forward was not the planned one.
        self.postponed = False
        self._widths: WidthChooser | None = None
        self._ended: float | None = None  # time of the end of the last schedule

    def begin(self, batch: Batch, paged: PagedBatch) -> SegmentForward | None:
        """The first forward of a schedule, None where there is nothing to compute."""
        self.batch, self._paged = batch, paged
        self._planned = self._next_forward()
        return self._planned

    def needed_rows(self) -> torch.Tensor:
        """[n] int64, the rows of the planned forward that need logits."""
        return torch.from_numpy(self.plan.rows.index).to(self.device)

    def _next_forward(self) -> SegmentForward | None:
        """Plan a forward of the batch from the canvases as they are now."""
        self.plan = make_plan(self.canvas, self.batch)
        if not len(self.plan.segments.owner):
            return None
        self.plan = add_drafts(self.canvas, self.batch, self.plan)
        segments = self.plan.segments
        if self.plan.drafts is not None:
            self._copy_text(segments)
        ids = [
            self._prompt_ids(b) if self.batch.prefilling[b] else self._canvas_ids(s)
            for s, b in enumerate(segments.owner.tolist())
        ]
        return self._paged.forward(segments, np.concatenate(ids))

    def _copy_text(self, segments: Segments) -> None:
        """Once a block, give the pages of drafts the text before the canvas."""
        slots = self.batch.slots[segments.owner]
        new = segments.version > self.canvas.copied[slots]
        self._paged.copy_text(segments, new)
        np.maximum.at(self.canvas.copied, slots, segments.version)

    def _prompt_ids(self, index: int) -> np.ndarray:
        begin = self.batch.prompt_start[index]
        return self.batch.prompt_ids[begin : begin + self.batch.scheduled[index]]

    def _canvas_ids(self, index: int) -> np.ndarray:
        """Tokens of a segment of canvas columns."""
        plan, segments = self.plan, self.plan.segments
        b = segments.owner[index]
        slot = self.batch.slots[b]
        start = self.canvas.start[slot]
        tokens = self.canvas.tokens[slot]
        if segments.version[index]:
            assert plan.drafts is not None
            tokens = plan.drafts.canvas[index - len(segments.owner)]
        elif not segments.causal[index]:
            tokens = plan.canvas[b]
            start += plan.text[b]
        low = segments.first[index] - start
        return tokens[low : low + segments.length[index]]

    def run(self, logits: torch.Tensor) -> Emitted:
        """Decide the schedule's first forward, then go on until the scheduler has to know.

        That is once a request has no room for more tokens in this schedule, ends, or has
        constraints that read emitted tokens. With prefill in the batch there is one forward.
        """
        batch, decoder = self.batch, self.decoder
        self._choose_widths(batch)
        emitted = Emitted.nothing(len(batch.slots), self.canvas.tokens.shape[1])
        if self._planned is None:
            return emitted
        if self.postponed:
            self.postponed = False
            logits = self._logits(self._planned)
        decoder.step(logits, batch, self.plan, emitted)
        first_rows = int(self.plan.segments.length.sum())
        more = 0 if batch.prefilling.any() else self.steps_per_schedule - 1
        while more and self._goes_on(emitted):
            more -= 1
            began = perf_counter()
            forward = self._next_forward()
            assert forward is not None
            planned = perf_counter()
            logits = self._logits(forward)
            if self._widths is not None:
                self._wait()
            ran = perf_counter()
            decoder.step(logits, batch, self.plan, emitted)
            if self._widths is not None:
                rows, whole = len(forward.input_ids), perf_counter() - began
                self._widths.observe_forward(rows, ran - planned, whole)
        self._observe_schedule(int(emitted.forwards.max()), first_rows)
        # What follows an end or a prefill is not the time of a schedule alone.
        steady = not (emitted.ended.any() or batch.prefilling.any())
        self._ended = perf_counter() if steady else None
        return emitted

    def _logits(self, forward: SegmentForward) -> torch.Tensor:
        """Logits [n, V] of the rows that the plan needs."""
        hidden = self.model(input_ids=None, positions=forward.positions, segments=forward)
        return self.model.compute_logits(hidden[self.needed_rows()])

    def _observe_schedule(self, forwards: int, rows: int) -> None:
        if self._widths is not None and self._ended is not None:
            self._widths.observe_schedule(perf_counter() - self._ended, forwards, rows)

    def _choose_widths(self, batch: Batch) -> None:
        """Set the width of canvases that requests of mode `auto` begin in this schedule."""
        auto = self.canvas.auto[batch.slots]
        if not auto.any():
            return
        if self._widths is None:
            cost = CostModel(self.run_rows)
            self._widths = WidthChooser(cost, self.canvas.tokens.shape[1], self.steps_per_schedule)
            self.decoder.observe_draft = self._widths.observe
        others = self.canvas.width[batch.slots[~auto & ~batch.prefilling]]
        width = self._widths.choose(int(auto.sum()), int(others.sum()))
        self.canvas.set_draft_length(batch.slots[auto], width)

    def run_rows(self, rows: int) -> None:
        """The model's forward and logits of `rows` tokens without attention, for its time."""
        ids = torch.zeros(rows, dtype=torch.int32, device=self.device)
        positions = torch.arange(rows, device=self.device)
        with set_forward_context(None, self.vllm_config, num_tokens=rows):
            self.model.compute_logits(self.model(input_ids=ids, positions=positions))
        self._wait()

    def _wait(self) -> None:
        """Until the device is done: what is timed must have been computed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _goes_on(self, emitted: Emitted) -> bool:
        slots = self.batch.slots
        if emitted.ended.any() or not emitted.count.any():
            return not emitted.ended.any()
        if any(slot in self.canvas.constraints for slot in slots[emitted.count > 0].tolist()):
            return False
        return bool((self.canvas.width[slots] <= self.batch.scheduled - emitted.count).all())
