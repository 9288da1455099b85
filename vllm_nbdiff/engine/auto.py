# SPDX-License-Identifier: Apache-2.0
"""How much is drafted: the width of drafts in mode `auto`, and wherever drafts are made while the
text before them is verified, what is worth its rows. Measured and set here, chosen by a
`DraftChooser`."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_nbdiff.decoding.emitted import Emitted
from vllm_nbdiff.decoding.fan_out import VerifiedTexts
from vllm_nbdiff.engine.chooser import NOTHING_MORE, DraftChooser, Verified
from vllm_nbdiff.engine.cost import CostModel
from vllm_nbdiff.engine.options import OptionTable
from vllm_nbdiff.engine.ranks import Agree
from vllm_nbdiff.engine.schedule import Schedule


class _Told(NamedTuple):
    """What the requests of a forward were told, [B] each."""

    drafting: np.ndarray  # bool, which of them draft
    reading: np.ndarray  # drafts are made in forwards that read text
    chance: np.ndarray  # those of `Limits`
    survival: np.ndarray


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
        self._arriving: list[tuple[torch.cuda.Event | None, _Told, Tensor]] = []
        # Time of the end of the last schedule, with static shapes if it was plain.
        self._ended: float | None = None
        self._rows = 0
        self._forwards: list[tuple[int, float]] = []  # rows and seconds of those that were timed

    def begin_schedule(self, schedule: Schedule) -> None:
        """Choose how much canvases that begin in this schedule draft."""
        options, slots = self.options, schedule.slots
        auto = options.is_auto[slots]
        self._drafting = auto
        if self.sets_limits:
            self._drafting = auto | (options.host["fan_out"][slots] > 0)
        self._forwards = []
        if self.static:
            self._rows = int(schedule.scheduled.sum())
        if not self._drafting.any():
            return
        self._learn()
        own = auto & schedule.decodes
        if own.any() and not self.static:
            self.chooser.room = int(schedule.scheduled[own].mean())
        if auto.any():
            others = self._rows_of(schedule, schedule.decodes & ~auto)
            # Those whose prompts are read begin canvases with this schedule.
            fan_out = int(options.host["fan_out"][slots[auto]].max())
            width = self.chooser.choose(int(auto.sum()), others, fan_out)
            options.set_draft_length(slots[auto], int(self._agree(np.array([width]))[0]))
        fans = options.host["fan_out"][slots] > 0
        if self.sets_limits:
            others = self._rows_of(schedule, schedule.decodes & ~self._drafting)
            self._set_limits(slots, fans, others)
        limits = (options.host[name][slots] for name in ("least_chance", "least_survival"))
        told = (np.where(fans, *each) for each in zip(limits, NOTHING_MORE, strict=True))
        self._told = _Told(self._drafting, options.host["drafts"][slots], *told)

    def _rows_of(self, schedule: Schedule, those: np.ndarray) -> int:
        """Of a forward, of the requests that `those` [B] bool says: what is scheduled where shapes
        are static, elsewhere about a canvas."""
        if self.static:
            return int(schedule.scheduled[those].sum())
        return int(self.options.host["block_length"][schedule.slots[those]].sum())

    def _set_limits(self, slots: np.ndarray, fans: np.ndarray, other_rows: int) -> None:
        """Of the requests that draft for break points, those that `fans` [B] bool says."""
        host, count = self.options.host, int(self._drafting.sum())
        widths = host["block_length"][slots]
        for width in sorted(set(widths[fans].tolist())):
            own = slots[fans & (widths == width)]
            fan_out = int(host["fan_out"][own].max())
            limits = self.chooser.expected(width, count, other_rows, fan_out).limits
            self.options.set_limits(own, *self._agree(np.array(limits)).tolist())

    def observe_drafts(self, verified: VerifiedTexts | None) -> None:
        """Learn from verified texts when the next schedule begins."""
        if verified is None or not self._drafting.any():
            return
        numbers, event = torch.stack(verified.numbers()), None
        if numbers.is_cuda:
            event = torch.cuda.Event()
            numbers = numbers.to("cpu", non_blocking=True)
            event.record()
        self._arriving.append((event, self._told, numbers))

    def _learn(self) -> None:
        """Learn from the texts whose numbers are there."""
        texts = []
        while self._arriving and ((event := self._arriving[0][0]) is None or event.query()):
            _, told, there = self._arriving.pop(0)
            text = Verified._make([*there.numpy(), *told[1:]])
            texts.append([field[told.drafting & (text.text > 0)] for field in text])
        if texts:
            self.chooser.observe(Verified._make(map(np.concatenate, zip(*texts, strict=True))))

    def begin_forward(self, rows: int) -> None:
        """Note the rows of a forward that has rows of its own."""
        self._rows = rows

    def observe_forward(self, seconds: float) -> None:
        """Note what that forward took, from its plan to its decisions."""
        self._forwards.append((self._rows, seconds))

    def end_schedule(self, emitted: Emitted, is_timed: bool) -> None:
        """Learn from a schedule and the time before it.

        Args:
            emitted: of the schedule.
            is_timed: its first forward is, which read no prompts; those come after a pause.
        """
        now, last = perf_counter(), self._ended
        self._ended = now if is_timed or not self.static else None
        if not self._drafting.any() or last is None:
            return
        if self.static:
            if is_timed:
                self.chooser.cost.observe(self._rows, now - last)
            return
        self.chooser.observe_ends(int(emitted.count.sum()), int(emitted.ended.sum()))
        self.chooser.observe_schedule(self._forwards, now - last if is_timed else None)
