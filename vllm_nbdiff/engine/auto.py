# SPDX-License-Identifier: Apache-2.0
"""How many tokens to draft: the width of a canvas in mode `auto`.

All choices verify, so the text is always that of AR decoding; width 1 is AR decoding itself. The
best width gives the most accepted tokens a second: rows are nearly free while a forward is bound by
reading weights, and cost their arithmetic beyond that. Both sides are measured: a forward's time by
rows, and the acceptance, while serving.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from vllm_nbdiff.decoding.emitted import Emitted
from vllm_nbdiff.engine.options import OptionTable
from vllm_nbdiff.engine.schedule import Schedule

WIDTHS = (1, 8, 16, 32)
_ROWS = np.array([1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
# Until other counts of rows were seen, time is taken to grow with rows to this power.
_GROWTH = 0.5
_SPEED, _SHAPE = 0.2, 0.02  # weight of a forward in the machine's speed, in the cost by rows
_NEAR = 0.2  # weight of a forward in host time
_MEMORY = 0.98  # weight of what was known when a draft is verified
_HYSTERESIS = 1.05
_PROBE_EVERY, _HOPELESS = 32, 0.25


class CostModel:
    """Seconds of a model forward by its number of rows, linear between the counts of `_ROWS`.

    Learned from forwards that are run anyway. A count of rows that is seen for the first times says
    how long such a forward takes; later how fast the machine is at the moment, which is all that a
    busy one changes, is learned quickly and what rows cost slowly.
    """

    def __init__(self) -> None:
        self._seconds = np.ones(len(_ROWS))
        self._seen = np.zeros(len(_ROWS))
        self.slowness = 1.0

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a forward that was run."""
        if not self._seen.any():
            self._seconds = seconds * (_ROWS / rows) ** _GROWTH
        error = seconds / self.seconds(rows)
        above = min(int(np.searchsorted(_ROWS, rows)), len(_ROWS) - 1)
        below = max(above - 1, 0)
        span = max(_ROWS[above] - _ROWS[below], 1)
        share = float(np.clip((rows - _ROWS[below]) / span, 0, 1))
        known = min(self._seen[above if share > 0.5 else below], 1 / _SHAPE)
        speed = _SPEED * min(known / 4, 1)
        self.slowness *= error**speed
        error **= 1 - speed
        for place, weight in ((above, share), (below, 1 - share)):
            count = self._seen[place]
            self._seconds[place] *= error ** (max(_SHAPE, 1 / (1 + count) ** 2) * weight)
            self._seen[place] += weight

    def seconds(self, rows: int) -> float:
        """A forward of so many rows; more rows never take less."""
        known = np.maximum.accumulate(self._seconds)
        if rows <= _ROWS[-1]:
            return self.slowness * float(np.interp(rows, _ROWS, known))
        slope = (known[-1] - known[-2]) / (_ROWS[-1] - _ROWS[-2])
        return self.slowness * float(known[-1] + slope * (rows - _ROWS[-1]))


class WidthChooser:
    """Chooses one width for all `auto` requests of a batch."""

    def __init__(self, cost: CostModel, max_width: int, max_forwards: int) -> None:
        """
        Args:
            cost: of a forward.
            max_width: tokens that a schedule may emit for a request.
            max_forwards: forwards that a schedule may run.
        """
        self.cost = cost
        self.max_width = max_width
        self.max_forwards = max_forwards
        self.widths = [width for width in WIDTHS if width <= max_width]
        self.width = self.widths[-1]
        # How often a drafted column was right, of the times that all before it were.
        self._tried = np.ones(max_width)
        self._right = np.ones(max_width)
        self._choices = 0
        self._beside = 0.0  # seconds of a forward beside the model's
        self._between = 0.0  # seconds of a schedule outside of its forwards

    def observe_forward(self, rows: int, model: float, whole: float) -> None:
        """Learn from a forward of `rows` rows: seconds in the model, and with planning, sampling
        and bookkeeping."""
        self.cost.observe(rows, model)
        self._beside += _NEAR * (whole - model - self._beside)

    def observe_schedule(self, seconds: float, forwards: int, rows: int) -> None:
        """Learn from a schedule of `forwards` of `rows` rows, from the end of the one before."""
        between = max(seconds - forwards * (self.cost.seconds(rows) + self._beside), 0.0)
        self._between += _NEAR * (between - self._between)

    def observe(self, width: int, accepted: int) -> None:
        """Learn from a verified draft of `width` tokens, the first `accepted` of them right."""
        seen = np.arange(1, min(accepted + 1, width))
        self._tried[seen] = _MEMORY * self._tried[seen] + 1
        self._right[seen] = _MEMORY * self._right[seen] + (seen < accepted)

    def tokens_per_forward(self, width: int) -> float:
        """Expected: the seed and the drafted tokens before the first wrong one, in two forwards."""
        if width == 1:
            return 1.0
        return float(np.cumprod(self._right[:width] / self._tried[:width]).sum()) / 2

    def speed(self, width: int, rows: int) -> float:
        """Expected tokens a second of one request, in forwards of `rows` rows."""
        tokens = self.tokens_per_forward(width)
        each = 1 if width == 1 else 2
        drafts = (self.max_width - width) // max(each * tokens, 1) + 1
        forwards = min(each * drafts, self.max_forwards)
        return tokens / (self.cost.seconds(rows) + self._beside + self._between / forwards)

    def choose(self, num_requests: int, other_rows: int) -> int:
        """The width of the next canvases.

        Args:
            num_requests: `auto` requests in the batch.
            other_rows: rows of the other requests in a forward.
        """
        self._choices += 1
        speed = {
            width: self.speed(width, num_requests * width + other_rows) for width in self.widths
        }
        best = max(speed, key=lambda width: speed[width])
        if speed[best] > _HYSTERESIS * speed[self.width]:
            self.width = best
        turn, rest = divmod(self._choices, _PROBE_EVERY)
        if rest:
            return self.width
        # What is never tried is never known to have become better; by turns the two next to it.
        beside = self.widths.index(self.width) + (1 if turn % 2 else -1)
        probe = self.widths[min(max(beside, 0), len(self.widths) - 1)]
        return probe if speed[probe] > _HOPELESS * speed[self.width] else self.width


class AutoDrafts:
    """Sets the draft length of `auto` requests, from what their forwards show.

    On a GPU nothing waits for that: what was accepted is read once it has arrived, and a forward
    takes as long as it is until the next one is decided.
    """

    def __init__(self, options: OptionTable, steps_per_schedule: int, static: bool) -> None:
        """
        Args:
            options: of all requests.
            steps_per_schedule: most forwards of a schedule.
            static: nothing may be read back; a schedule is one forward.
        """
        self.options = options
        self.static = static
        self.chooser = WidthChooser(CostModel(), options.config.block_length, steps_per_schedule)
        self._auto = np.zeros(0, np.bool_)
        self._arriving: list[tuple[torch.cuda.Event, np.ndarray, Tensor]] = []
        self._ended: float | None = None  # time of the end of the last schedule, if it was plain
        self._rows = 0

    def begin_schedule(self, schedule: Schedule) -> None:
        """Choose the draft length of canvases that begin in this schedule."""
        auto = self.options.is_auto[schedule.slots] & schedule.decodes
        self._auto = self.options.is_auto[schedule.slots]
        self._rows = int(schedule.scheduled.sum())
        if not self._auto.any():
            return
        while self._arriving and self._arriving[0][0].query():
            _, chosen, numbers = self._arriving.pop(0)
            self._learn(chosen, numbers.numpy())
        others = ~self._auto & schedule.decodes
        width = self.chooser.choose(max(int(auto.sum()), 1), int(schedule.scheduled[others].sum()))
        self.options.set_draft_length(schedule.slots[self._auto], width)

    def observe_drafts(self, read: tuple[Tensor, Tensor] | None) -> None:
        """Learn from verified texts: tokens [B], and how many of them held [B]."""
        if read is None or not self._auto.any():
            return
        numbers = torch.stack(read)
        if numbers.is_cuda:
            event = torch.cuda.Event()
            there = numbers.to("cpu", non_blocking=True)
            event.record()
            self._arriving.append((event, self._auto, there))
        else:
            self._learn(self._auto, numbers.numpy())

    def _learn(self, chosen: np.ndarray, numbers: np.ndarray) -> None:
        for width, accepted in numbers[:, chosen].T.tolist():
            if width > 1:
                self.chooser.observe(width, accepted)

    def observe_forward(self, rows: int, model: float, whole: float) -> None:
        """As `WidthChooser.observe_forward`."""
        self._rows = rows
        if self._auto.any():
            self.chooser.observe_forward(rows, model, whole)

    def end_schedule(self, forwards: int, emitted: Emitted, prefills: bool) -> None:
        """Learn from the time between schedules: this one's forwards, what it emitted, and whether
        it held prompts."""
        now = perf_counter()
        if self._auto.any() and self._ended is not None:
            if self.static:
                self.chooser.observe_forward(self._rows, now - self._ended, now - self._ended)
            else:
                self.chooser.observe_schedule(now - self._ended, forwards, self._rows)
        # What follows an end or a prefill is not the time of a schedule alone.
        plain = not prefills and (self.static or not bool(emitted.ended.any()))
        self._ended = now if plain else None
