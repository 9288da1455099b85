# SPDX-License-Identifier: Apache-2.0
"""How much is drafted: the width of drafts in mode `auto`, and wherever drafts are made while the
text before them is verified, what is worth its rows. Measured and set here, chosen by a
`DraftChooser`."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from vllm_nbdiff.decoding.emitted import Emitted
from vllm_nbdiff.decoding.fan_out import VerifiedTexts
from vllm_nbdiff.engine.chooser import DraftChooser, Verified
from vllm_nbdiff.engine.cost import CostModel
from vllm_nbdiff.engine.options import OptionTable
from vllm_nbdiff.engine.ranks import Agree
from vllm_nbdiff.engine.schedule import Schedule


class AutoDrafts:
    """Sets how much requests draft, from what their forwards show.

    On a GPU nothing waits for that: what was accepted is read once it has arrived, and a forward
    takes as long as it is until the next one is decided. What is scheduled there is computed, so
    nothing of it is left out.
    """

    def __init__(
        self,
        options: OptionTable,
        steps_per_schedule: int,
        seconds_per_schedule: float,
        static: bool,
        agree: Agree,
    ) -> None:
        """
        Args:
            options: of all requests.
            steps_per_schedule: most forwards of a schedule.
            seconds_per_schedule: none begins later than that in a schedule.
            static: nothing may be read back; a schedule is one forward.
            agree: on what is chosen, as what is measured differs between ranks.
        """
        self.options = options
        self.static = static
        self.sets_limits = not static
        self._agree = agree
        self.chooser = DraftChooser(
            CostModel(),
            options.config.block_length,
            steps_per_schedule,
            seconds_per_schedule,
            static,
        )
        self._drafting = np.zeros(0, np.bool_)
        self._arriving: list[tuple[torch.cuda.Event | None, np.ndarray, np.ndarray, Tensor]] = []
        # Time of the end of the last schedule, with static shapes if it was plain.
        self._ended: float | None = None
        self._rows = 0

    def begin_schedule(self, schedule: Schedule) -> None:
        """Choose how much canvases that begin in this schedule draft."""
        options, slots = self.options, schedule.slots
        auto = options.is_auto[slots]
        self._drafting = auto
        if self.sets_limits:
            self._drafting = auto | (options.host["fan_out"][slots] > 0)
        self._drafts_reading = options.host["drafts"][slots]
        if self.static:
            self._rows = int(schedule.scheduled.sum())
        if not self._drafting.any():
            return
        self._learn()
        own = auto & schedule.decodes
        if own.any() and not self.static:
            self.chooser.room = int(schedule.scheduled[own].mean())
        if auto.any():
            others = int(schedule.scheduled[schedule.decodes & ~auto].sum())
            # Those whose prompts are read begin canvases with this schedule.
            width = self.chooser.choose(int(auto.sum()), others)
            options.set_draft_length(slots[auto], int(self._agree(np.array([width]))[0]))
        if self.sets_limits:
            self._set_limits(slots, self._drafting & schedule.decodes)

    def _set_limits(self, slots: np.ndarray, drafting: np.ndarray) -> None:
        count, widths = int(drafting.sum()), self.options.host["block_length"][slots]
        for width in sorted(set(widths[drafting].tolist())):
            limits = self.chooser.limits(width, count, self._rows)
            chance, survival = self._agree(np.array(limits)).tolist()
            self.options.set_limits(slots[drafting & (widths == width)], chance, survival)

    def observe_drafts(self, verified: VerifiedTexts | None) -> None:
        """Learn from verified texts when the next schedule begins."""
        if verified is None or not self._drafting.any():
            return
        numbers, event = torch.stack(verified.numbers()), None
        if numbers.is_cuda:
            event = torch.cuda.Event()
            numbers = numbers.to("cpu", non_blocking=True)
            event.record()
        self._arriving.append((event, self._drafting, self._drafts_reading, numbers))

    def _learn(self) -> None:
        """Learn from the texts whose numbers are there."""
        texts = []
        while self._arriving and ((event := self._arriving[0][0]) is None or event.query()):
            _, drafting, reading, there = self._arriving.pop(0)
            numbers = np.concatenate([there.numpy(), reading[None]])
            texts.append(numbers[:, drafting & (numbers[1] > 0)])
        if texts:
            self.chooser.observe(Verified._make(np.concatenate(texts, axis=1)))

    def begin_forward(self, rows: int) -> None:
        """Note the rows of a forward that has rows of its own."""
        self._rows = rows

    def observe_forward(self, seconds: float) -> None:
        """Learn from that forward: what it took, from its plan to its decisions."""
        if self._drafting.any():
            self.chooser.cost.observe(self._rows, seconds)

    def end_schedule(self, forwards: int, emitted: Emitted, prefills: bool) -> None:
        """Learn from the time between schedules: this one's forwards, what it emitted, and whether
        it held prompts."""
        now, last = perf_counter(), self._ended
        self._ended = None if self.static and prefills else now
        if not self._drafting.any() or last is None:
            return
        if self.static:
            self.chooser.cost.observe(self._rows, now - last)
            return
        self.chooser.observe_ends(int(emitted.count.sum()), int(emitted.ended.sum()))
        if not prefills:  # which come after a pause, and take their time
            self.chooser.observe_schedule(now - last, forwards, self._rows)
