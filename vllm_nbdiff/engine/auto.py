# SPDX-License-Identifier: Apache-2.0
"""How many tokens to draft: the width of a canvas in mode `auto`.

All choices verify, so the text is always that of AR decoding; width 1 is AR decoding itself. The
best width gives the most accepted tokens a second: rows are nearly free while a forward is bound by
reading weights, and cost their arithmetic beyond that. Both sides are measured: a forward's time by
rows before the first choice and while serving, the acceptance while serving.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np

WIDTHS = (1, 8, 16, 32)
_ROWS = np.array([1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
_MEASURED = 5  # so many of them, before the first choice; the rest follows from the last two
_SPEED, _SHAPE = 0.2, 0.02  # weight of a forward in the machine's speed, in the cost by rows
_NEAR = 0.2  # weight of a forward in host time
_MEMORY = 0.98  # weight of what was known when a draft is verified
_HYSTERESIS = 1.05
_PROBE_EVERY, _HOPELESS = 32, 0.25


class CostModel:
    """Seconds of a model forward by its number of rows, linear between the counts of `_ROWS`.

    What is measured at first is learned on slowly; how fast the machine is at the moment, which is
    all that a busy one changes, quickly.
    """

    def __init__(self, run: Callable[[int], None]) -> None:
        """
        Args:
            run: runs the bare model on this many rows.
        """
        measured = [min(_timed(run, int(rows)) for _ in range(6)) for rows in _ROWS[:_MEASURED]]
        slope = max(measured[-1] - measured[-2], 0.0) / (
            _ROWS[_MEASURED - 1] - _ROWS[_MEASURED - 2]
        )
        beyond = measured[-1] + slope * (_ROWS[_MEASURED:] - _ROWS[_MEASURED - 1])
        self._seconds = np.concatenate([measured, beyond])
        self.slowness = 1.0

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a forward that was run."""
        error = seconds / self.seconds(rows)
        self.slowness *= error**_SPEED
        above = min(int(np.searchsorted(_ROWS, rows)), len(_ROWS) - 1)
        below = max(above - 1, 0)
        span = max(_ROWS[above] - _ROWS[below], 1)
        share = float(np.clip((rows - _ROWS[below]) / span, 0, 1))
        self._seconds[above] *= error ** (_SHAPE * share)
        self._seconds[below] *= error ** (_SHAPE * (1 - share))

    def seconds(self, rows: int) -> float:
        """A forward of so many rows; more rows never take less."""
        known = np.maximum.accumulate(self._seconds)
        if rows <= _ROWS[-1]:
            return self.slowness * float(np.interp(rows, _ROWS, known))
        slope = (known[-1] - known[-2]) / (_ROWS[-1] - _ROWS[-2])
        return self.slowness * float(known[-1] + slope * (rows - _ROWS[-1]))


def _timed(run: Callable[[int], None], rows: int) -> float:
    start = perf_counter()
    run(rows)
    return perf_counter() - start


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
