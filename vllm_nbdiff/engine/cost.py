# SPDX-License-Identifier: Apache-2.0
"""What a forward costs by its number of rows, learned while serving: the model and, as rows of
logits are drawn from, what is done beside it."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from math import exp, log, sqrt

# Numbers of Python: every forward asks for a few of them, and reading one of numpy takes longer.
_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# As shares of what a forward takes, standard deviations: of one from the next; of the machine's
# speed, and of either cost alone, from forward to forward.
_NOISE, _SPEED, _CHANGE = 0.25, 0.05, 0.002
_PRIOR = 3.0  # of both numbers before anything is known
_HELD_UP = 2.0  # standard deviations: what took longer says no more than this
_LEAST = 1e-6  # seconds of a forward
_FREE_ROWS = 100  # before anything is known, as many rows cost what a forward does without them
# What a line misses by a count of rows: how far one forward may be off, how many it takes to be
# believed, the weight of each, at least, and how much of it is forgotten.
_MISS, _DOUBT, _SHAPE, _BACK = 1.3, 8, 0.03, 0.1


class CostModel:
    """Seconds of a forward by its number of rows, learned from forwards that are run anyway.

    So much for each forward and so much for each of its rows, two numbers that a Kalman filter
    learns: a few forwards of two counts of rows say what all others take, and a machine that is
    busy for a while changes both numbers, and no choice. What such a line misses is kept by counts
    of rows, linear between them.
    """

    def __init__(self) -> None:
        self.num_seen = 0
        """Forwards that were seen."""
        self._line = (1e-3, 1e-5)
        """Seconds of a forward, and of a row."""
        self._variance: tuple[float, float, float] | None = None
        """Of the first number, of both together, of the second."""
        self._missed, self._seen = [0.0] * len(_ROWS), [0.0] * len(_ROWS)
        """Logarithms of factors by counts of rows; forwards that were seen next to each."""
        self._set_seconds()

    def _set_seconds(self) -> None:
        each, row = self._line
        factors = zip(_ROWS, self._missed, strict=True)
        self._seconds = list(accumulate(((each + row * n) * exp(f) for n, f in factors), max))

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a forward that was run."""
        self.num_seen += 1
        seconds = max(seconds, _LEAST)  # a clock may stand
        if self._variance is None:
            row = seconds / (rows + _FREE_ROWS)
            each = row * _FREE_ROWS
            self._line, self._variance = (
                (each, row),
                ((_PRIOR * each) ** 2, 0.0, (_PRIOR * row) ** 2),
            )
            self._set_seconds()
        expected = self.seconds(rows)
        self._learn_line(rows, seconds, expected)
        self._learn_missed(rows, seconds)
        self._set_seconds()

    def _learn_line(self, rows: int, seconds: float, expected: float) -> None:
        """A step of the filter; `seconds` is `factor * (each + row * rows)` and noise."""
        assert self._variance is not None
        each, row = self._line
        factor = expected / (each + row * rows)
        first, both, second = self._variance
        first += (_SPEED**2 + _CHANGE**2) * each**2
        both += _SPEED**2 * each * row
        second += (_SPEED**2 + _CHANGE**2) * row**2
        of_each, of_row = factor * (first + both * rows), factor * (both + second * rows)
        variance = max(factor * (of_each + of_row * rows), 0.0) + (_NOISE * expected) ** 2
        error = min(seconds - expected, _HELD_UP * sqrt(variance)) / variance
        self._variance = (
            max(first - of_each**2 / variance, 0.0),
            both - of_each * of_row / variance,
            max(second - of_row**2 / variance, 0.0),
        )
        # Neither may vanish, or even be less than nothing.
        self._line = (
            max(each + of_each * error, each / 10, _LEAST),
            max(row + of_row * error, row / 10, _LEAST / _ROWS[-1]),
        )

    def _learn_missed(self, rows: int, seconds: float) -> None:
        """By what factor the line is off next to `rows`."""
        above, share = self._place(rows)
        share = min(share, 1)
        low, high = self._missed[above - 1 : above + 1]
        each, row = self._line
        missed = seconds / ((each + row * rows) * exp(low + (high - low) * share))
        error = log(min(max(missed, 1 / _MISS), _MISS))
        for place, weight in ((above, share), (above - 1, 1 - share)):
            near = max(1 / (_DOUBT + self._seen[place]), _SHAPE)
            # What the line can say it says: noise would drive the two apart.
            self._missed[place] += near * weight * (error - _BACK * self._missed[place])
            self._seen[place] += weight

    @staticmethod
    def _place(rows: int) -> tuple[int, float]:
        """The place of `_ROWS` next above `rows`, and how much of the way from the one below it."""
        above = min(max(bisect_left(_ROWS, rows), 1), len(_ROWS) - 1)
        first, last = _ROWS[above - 1 : above + 1]
        return above, max(rows - first, 0) / (last - first)

    def doubt(self, rows: int) -> float:
        """Standard deviation of what such a forward takes, as a share: 1 is next to unknown."""
        if self._variance is None:
            return 1.0
        first, both, second = self._variance
        each, row = self._line
        return sqrt(max(first + 2 * both * rows + second * rows**2, 0.0)) / (each + row * rows)

    def seconds(self, rows: int) -> float:
        """A forward of so many rows; more rows never take less."""
        above, share = self._place(rows)
        low, high = self._seconds[above - 1 : above + 1]
        return low + (high - low) * share
