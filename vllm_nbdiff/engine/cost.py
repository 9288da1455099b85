# SPDX-License-Identifier: Apache-2.0
"""What a forward costs by its number of rows, learned while serving: the model and, as rows of
logits are drawn from, what is done beside it."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate, pairwise
from math import log

# Numbers of Python: every forward asks for a few of them, and reading one of numpy takes longer.
_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Beyond the counts of rows that were seen, time is taken to grow with rows to this power at least.
_GROWTH = 0.5
_NEAR = 0.5  # share of a forward's rows by which it says what that count of `_ROWS` costs
# Weight of a forward in the machine's speed, in full behind so many, and, at least, in the cost by
# rows.
_SPEED, _FIRST, _SHAPE = 0.2, 16, 0.03


class CostModel:
    """Seconds of a forward by its number of rows, linear between the counts of `_ROWS`.

    Learned from forwards that are run anyway. What a count of rows costs is the mean of the first
    ones, as any of them may have been held up; later how fast the machine is at the moment, which
    is all that a busy one changes, is learned quickly and what rows cost slowly.
    """

    def __init__(self) -> None:
        self._seen = [0.0] * len(_ROWS)
        self._known = [False] * len(_ROWS)
        self.slowness = 1.0
        self._set([1e-3 * rows**_GROWTH for rows in _ROWS])

    def _set(self, seconds: list[float]) -> None:
        self._seconds = seconds
        self._rising = list(accumulate(seconds, max))

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a forward that was run."""
        seconds = max(seconds, 1e-6)  # a clock may stand
        if not any(self._seen):
            self._set([seconds * (count / rows) ** _GROWTH for count in _ROWS])
        error = seconds / self.seconds(rows)
        above = min(bisect_left(_ROWS, rows), len(_ROWS) - 1)
        below = max(above - 1, 0)
        span = max(_ROWS[above] - _ROWS[below], 1)
        share = min(max((rows - _ROWS[below]) / span, 0), 1)
        known = min(self._seen[above if share > 0.5 else below], 1 / _SHAPE)
        speed = _SPEED * min(known / _FIRST, 1)
        self.slowness *= error**speed
        error **= 1 - speed
        for place, weight in ((above, share), (below, 1 - share)):
            count = self._seen[place]
            self._seconds[place] *= error ** (max(_SHAPE, 1 / (1 + count)) * weight)
            self._seen[place] += weight
            if weight >= _NEAR and (count < _FIRST or not self._known[place]):
                self._known[place] = True
                self._guess_others()
        self._set(self._seconds)

    def _guess_others(self) -> None:
        """What other counts cost by those that are known: a power law between two; behind the last
        two as much a row as between them, but no less than that of `_GROWTH`."""
        known = [place for place, known in enumerate(self._known) if known]
        seconds = [self._seconds[place] for place in known]
        growths = [
            log(self._seconds[high] / self._seconds[low]) / log(_ROWS[high] / _ROWS[low])
            for low, high in pairwise(known)
        ]
        growths = [_GROWTH, *growths, _GROWTH]
        last, each = known[-1], 0.0
        if len(known) > 1:
            each = (seconds[-1] - seconds[-2]) / (_ROWS[last] - _ROWS[known[-2]])
            each = min(each, seconds[-1] / _ROWS[last])
        for place, rows in enumerate(_ROWS):
            if not self._known[place]:
                after = bisect_left(known, place)
                near = known[max(after - 1, 0)]
                least = seconds[-1] + each * (rows - _ROWS[last]) if place > last else 0.0
                guess = self._seconds[near] * (rows / _ROWS[near]) ** growths[after]
                self._seconds[place] = max(guess, least)

    def unknown(self, rows: int) -> int | None:
        """The count of `_ROWS` next to `rows`, unless forwards of that many were seen."""
        above = min(bisect_left(_ROWS, rows), len(_ROWS) - 1)
        near = min(max(above - 1, 0), above, key=lambda place: abs(_ROWS[place] - rows))
        return None if self._known[near] else _ROWS[near]

    def seconds(self, rows: int) -> float:
        """A forward of so many rows; more rows never take less."""
        above = min(max(bisect_left(_ROWS, rows), 1), len(_ROWS) - 1)
        low, high = self._rising[above - 1 : above + 1]
        first, last = _ROWS[above - 1 : above + 1]
        return self.slowness * (low + (high - low) * (max(rows, 1) - first) / (last - first))
