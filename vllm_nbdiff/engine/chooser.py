# SPDX-License-Identifier: Apache-2.0
"""Which width of drafts gives the most tokens a second, and what is worth its rows.

All choices verify, so the text is always that of AR decoding; width 1 is AR decoding itself. The
best choice gives the most accepted tokens a second: rows are nearly free while a forward is bound
by reading weights, and cost their arithmetic beyond that. Both sides are measured: a forward's time
by rows, and the acceptance, while serving.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vllm_nbdiff.engine.cost import CostModel
from vllm_nbdiff.request_options import DEFAULT_DRAFT_LENGTH

WIDTHS = (1, 8, 16, 32)
_NEAR = 0.2  # weight of a forward in host time
_MEMORY = 0.98  # weight of what was known when drafts are verified, or a schedule ends
# Chance of a column that nothing is known of, and how many tries outweigh that.
_GUESS, _DOUBT = 0.9, 0.1
_DOUBT_ROUNDS = 10  # that outweigh what a width gave in place of what was expected of it
_HYSTERESIS = 1.05
# Choices between tries, for each forward that one loses; forwards that one may lose for what its
# rows cost.
_PROBE_EVERY, _MOST_LOST = 32, 1.0


class Verified(NamedTuple):
    """What the texts that a forward verified showed, [n] int64 each."""

    width: np.ndarray  # columns of the canvas that was verified or drafted
    text: np.ndarray  # of them that were verified
    accepted: np.ndarray  # of them that held
    hit: np.ndarray  # 1: the next draft was made in the same forward
    rows: np.ndarray  # of the request in the forward
    drafts: np.ndarray  # 1: drafts are made in forwards that read text


class Limits(NamedTuple):
    """What of a batch's drafts is worth its rows."""

    chance: float  # of a break point for which a draft is made, at least
    survival: float  # chance that a column and all before it hold, at least, to be verified


class DraftChooser:
    """Chooses one width for all `auto` requests of a batch, and what is verified and drafted."""

    def __init__(
        self,
        cost: CostModel,
        max_width: int,
        max_forwards: int,
        max_seconds: float = math.inf,
        static: bool = False,
    ) -> None:
        """
        Args:
            cost: of a forward.
            max_width: most columns of a draft.
            max_forwards: forwards that a schedule may run.
            max_seconds: of a schedule, after which none begins.
            static: a request has `max_width` rows whatever it drafts.
        """
        self.cost = cost
        self.max_width, self.static = max_width, static
        self.room = max_width  # tokens that a schedule may emit for a request
        self.max_forwards, self.max_seconds = max_forwards, max_seconds
        self.widths = [width for width in WIDTHS if width <= max_width]
        self.width = max(width for width in self.widths if width <= DEFAULT_DRAFT_LENGTH)
        # How often a drafted column was right, of the times that all before it were.
        self._tried, self._right = np.zeros(max_width), np.zeros(max_width)
        # By width: how often the next draft was there already, how often the forward that makes it
        # otherwise gives a token, and rows a column of a request's forwards. A width that was not
        # seen yet is taken to be like those that are.
        self._hits = np.full(max_width + 1, 0.5)
        self._gives = np.zeros(max_width + 1)
        self._rows = np.full(max_width + 1, 1.5)
        self._seen = [0] * (max_width + 1)
        self._rows[1], self._seen[1] = 1, 1
        # By width, of the last rounds: tokens that they gave, and that were expected of them.
        self._held, self._expected = [0.0] * (max_width + 1), [0.0] * (max_width + 1)
        self._columns = np.arange(max_width)
        self._reached: list[float] | None = None
        self._waited, self._turn = 0, 0  # choices since one beside the best was tried, and tries
        self._probed: set[int | None] = {None}  # counts of rows that were unknown
        self._tokens, self._ends = 0.0, 0.0  # of the last schedules: emitted, requests that ended
        self._between = 0.0  # seconds of a schedule outside of its forwards

    def observe_schedule(self, seconds: float, forwards: int, rows: int) -> None:
        """Learn from a schedule of `forwards` of `rows` rows, from the end of the one before."""
        between = max(seconds - forwards * self.cost.seconds(rows), 0.0)
        self._between += _NEAR * (between - self._between)

    def observe_ends(self, tokens: int, ended: int) -> None:
        """Learn from what a schedule emitted, and how many requests ended in it."""
        self._tokens = _MEMORY * self._tokens + tokens
        self._ends = _MEMORY * self._ends + ended
        self._reached = None

    def observe(self, seen: Verified) -> None:
        """Learn from texts that were verified in one or several forwards."""
        seen = Verified._make(field[seen.width > 1] for field in seen)  # others draft nothing
        drafted = seen.text > 1  # behind a seed alone nothing was drafted before
        for width in set(seen.width.tolist()):
            own = seen.width == width
            self._seen[width] += 1
            alike = [width, *(other for other in self.widths if not self._seen[other])]
            near = max(1 - _MEMORY, 1 / (1 + self._seen[width]))
            # A draft that no forward makes beside a text has one of its own.
            rows = np.where(seen.drafts[own], seen.rows[own], (seen.rows[own] + width) / 2)
            self._rows[alike] += near * (rows.mean() / width - self._rows[alike])
            own &= drafted
            if own.any():
                self._hits[alike] += near * (seen.hit[own].mean() - self._hits[alike])
                self._gives[alike] += near * (seen.drafts[own].mean() - self._gives[alike])
                count, holds = int(own.sum()), int(seen.accepted[own].sum())
                expected = count * self._whole(width)
                self._expected[width] = _MEMORY * self._expected[width] + expected
                self._held[width] = _MEMORY * self._held[width] + holds
        if not drafted.any():
            return
        accepted = seen.accepted[drafted, None]
        tried = self._columns < np.minimum(accepted + 1, seen.text[drafted, None])
        self._tried = _MEMORY * self._tried + tried.sum(0)
        self._right = _MEMORY * self._right + (tried & (self._columns < accepted)).sum(0)
        self._reached = None

    def _whole(self, width: int) -> float:
        """Tokens expected of a round by the columns that hold, the token behind them among them.

        What lies behind the end of a text is of no use.
        """
        if self._reached is None:
            going_on = 1 - min(self._ends / max(self._tokens, 1), 1)
            right, tried = self._right[1:], self._tried[1:]
            holds = going_on * (right + _DOUBT * _GUESS) / (tried + _DOUBT)
            self._reached = [1.0, *(1 + holds.cumprod().cumsum()).tolist()]
        return self._reached[width - 1]

    def tokens_per_forward(self, width: int) -> float:
        """Expected of a request whose drafts have `width` columns.

        A round is a forward that verifies, and where the draft is not there yet, one that makes it;
        that gives one token where drafts are made in the forwards that read it.
        """
        if width == 1:
            return 1.0
        # Columns are not independent, nor are ends: what rounds gave over what was expected.
        doubt = _DOUBT_ROUNDS * self._whole(width)
        whole = self._whole(width) * ((self._held[width] + doubt) / (self._expected[width] + doubt))
        missing = 1 - float(self._hits[width])
        return (whole + missing * float(self._gives[width])) / (1 + missing)

    def speed(self, width: int, num_requests: int, rows: int) -> float:
        """Expected tokens a second of one request of so many, in forwards of `rows` rows."""
        tokens = self.tokens_per_forward(width)
        return tokens / self._seconds(width, tokens, num_requests, rows)

    def _seconds(self, width: int, tokens: float, num_requests: int, rows: int) -> float:
        """Of a forward of `rows` rows that gives a request so many tokens, with its share of what
        happens between schedules.

        A schedule ends where there is no room for more tokens, with its time, and with a request.
        """
        seconds = self.cost.seconds(rows)
        most = max(self.room - width, 0) // max(tokens, 1) + 1
        ends = num_requests * max(tokens, 1) * self._ends / max(self._tokens, 1)
        in_time = 1 + self.max_seconds / seconds
        forwards = min(most, in_time, self.max_forwards, 1 / max(-math.expm1(-ends), 1e-9))
        return seconds + self._between / forwards

    def rows_of(self, width: int, num_requests: int) -> int:
        """Expected of a forward of so many requests whose drafts have `width` columns."""
        columns = self.max_width if self.static else width * float(self._rows[width])
        return round(num_requests * columns)

    def choose(self, num_requests: int, other_rows: int) -> int:
        """The width of the next canvases.

        Args:
            num_requests: `auto` requests in the batch.
            other_rows: rows of the other requests in a forward.
        """
        rows = {width: self.rows_of(width, num_requests) + other_rows for width in self.widths}
        speed = {width: self.speed(width, num_requests, rows[width]) for width in self.widths}
        best = max(speed, key=lambda width: speed[width])
        if speed[best] > _HYSTERESIS * speed[self.width]:
            self.width = best
        return self._probe(rows, speed) or self.width

    def _probe(self, rows: dict[int, int], speed: dict[int, float]) -> int | None:
        """A width to try: what is never tried is never known to have become better."""
        now, seconds = self.width, {w: self.cost.seconds(rows[w]) for w in self.widths}
        # By each width, in forwards of the present one.
        lost = {w: seconds[w] / seconds[now] * (1 - speed[w] / speed[now]) for w in self.widths}
        # By turns the two next to it.
        beside = self.widths.index(now) + (1 if self._turn % 2 else -1)
        probe = self.widths[min(max(beside, 0), len(self.widths) - 1)]
        self._waited += 1
        if self._waited >= _PROBE_EVERY * max(lost[probe], 1):
            self._waited, self._turn = 0, self._turn + 1
            return probe
        # What forwards of so many rows cost is only guessed: one of each is seen soon.
        cheap = {w: self.cost.unknown(rows[w]) for w in self.widths if lost[w] < _MOST_LOST}
        new = [width for width, count in cheap.items() if count not in self._probed]
        if self._waited % 2 or not new:
            return None
        self._probed.add(cheap[new[0]])
        return new[0]

    def limits(self, width: int, num_requests: int, rows: int) -> Limits:
        """What is worth its rows where all `num_requests` requests take as much.

        A draft behind a break point saves its request a forward if the text breaks off there, a
        column of a text gives it a token if it holds; either costs all requests of the batch time.

        Args:
            rows: of a forward now.
        """
        if width == 1:
            return Limits(1.0, 0.0)
        tokens = self.tokens_per_forward(width)
        seconds = self._seconds(width, tokens, num_requests, rows)
        whole = num_requests * (width - 1)
        more = (self.cost.seconds(rows + whole) - self.cost.seconds(rows)) / seconds
        return Limits(
            chance=more * (2 - float(self._hits[width])),
            survival=more / (width - 1) * tokens,
        )
