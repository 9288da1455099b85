# SPDX-License-Identifier: Apache-2.0
"""What a forward costs by its number of rows, learned while serving: the model and, as rows of
logits are drawn from, what is done beside it."""

from __future__ import annotations

import numpy as np

_ROWS = np.array([1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
# Beyond the counts of rows that were seen, time is taken to grow with rows to this power at least.
_GROWTH = 0.5
_NEAR = 0.5  # share of a forward's rows by which it says what that count of `_ROWS` costs
_SPEED, _SHAPE = 0.2, 0.02  # weight of a forward in the machine's speed, in the cost by rows


class CostModel:
    """Seconds of a forward by its number of rows, linear between the counts of `_ROWS`.

    Learned from forwards that are run anyway. A count of rows that is seen for the first times says
    how long such a forward takes; later how fast the machine is at the moment, which is all that a
    busy one changes, is learned quickly and what rows cost slowly.
    """

    def __init__(self) -> None:
        self._seconds = 1e-3 * _ROWS**_GROWTH
        self._seen = np.zeros(len(_ROWS))
        self._known = np.zeros(len(_ROWS), np.bool_)
        self.slowness = 1.0

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a forward that was run."""
        seconds = max(seconds, 1e-6)  # a clock may stand
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
            if weight >= _NEAR and not self._known[place]:
                self._known[place] = True
                self._guess_others()

    def _guess_others(self) -> None:
        """What other counts cost by those that are known: a power law between two, which goes on
        behind the last two unless it is flatter than `_GROWTH`, or steeper than rows."""
        rows = np.log(_ROWS)
        known, seconds = rows[self._known], np.log(self._seconds[self._known])
        guess = np.interp(rows, known, seconds)
        growth = _GROWTH
        if len(known) > 1:
            last = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
            growth = float(np.clip(last, _GROWTH, 1))
        guess += _GROWTH * np.minimum(rows - known[0], 0) + growth * np.maximum(rows - known[-1], 0)
        self._seconds = np.where(self._known, self._seconds, np.exp(guess))

    def seconds(self, rows: int) -> float:
        """A forward of so many rows; more rows never take less."""
        known = np.maximum.accumulate(self._seconds)
        if rows <= _ROWS[-1]:
            return self.slowness * float(np.interp(rows, _ROWS, known))
        slope = (known[-1] - known[-2]) / (_ROWS[-1] - _ROWS[-2])
        return self.slowness * float(known[-1] + slope * (rows - _ROWS[-1]))
