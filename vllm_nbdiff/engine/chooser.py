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

from vllm_nbdiff.engine.break_points import BreakPoints
from vllm_nbdiff.engine.cost import CostModel
from vllm_nbdiff.request_options import DEFAULT_DRAFT_LENGTH

WIDTHS = (1, 8, 16, 32)
_NEAR = 0.2  # weight of a schedule in host time
_MOST_BETWEEN = 1.0  # seconds that are learned of those between two schedules
_MEMORY = 0.98  # weight of what was known when drafts are verified, or a schedule ends
# Chance of a column that nothing is known of, and how many tries outweigh that.
_GUESS, _DOUBT = 0.9, 0.1
_DOUBT_ROUNDS = 10  # that outweigh what rounds of a width gave in place of what was expected
_HYSTERESIS = 1.05
# Choices between tries, at least and for each forward that one loses.
_PROBE_EVERY, _PROBE_LOSES = 32, 64
# A forward is tried that may take so much less of its time, and may lose so many forwards.
_UNSURE, _MOST_LOST = 0.3, 1.0
_TURNS = 3  # a plan says what is worth its rows, and that what the next plan is


class Verified(NamedTuple):
    """What the texts that a forward verified showed, [n] int64 each; of `Limits` float64."""

    width: np.ndarray  # columns of the canvas that was verified or drafted
    text: np.ndarray  # of them that were verified
    accepted: np.ndarray  # of them that held
    hit: np.ndarray  # 1: the next draft was made in the same forward
    rows: np.ndarray  # of the request in the forward
    drafts: np.ndarray  # 1: drafts are made in forwards that read text
    chance: np.ndarray  # those of `Limits`
    survival: np.ndarray


class Limits(NamedTuple):
    """What of a batch's drafts is worth its rows."""

    chance: float  # of a break point for which a draft is made, at least
    survival: float  # chance that a column and all before it hold, at least, to be verified


ALL, NOTHING_MORE = Limits(0.0, 0.0), Limits(1.0, 0.0)


class Expected(NamedTuple):
    """Of forwards of drafts of one width."""

    tokens: float  # of a request in a forward
    rows: int  # of all requests
    speed: float  # tokens a second of one request
    limits: Limits


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
        self._reached: list[float] | None = None
        # By width, of the last rounds: tokens that they gave, and that were expected of them.
        self._held, self._expected = [0.0] * (max_width + 1), [0.0] * (max_width + 1)
        self._break_points = BreakPoints()
        self._gives = 0.0  # how often a forward that makes a draft gives a token
        self._columns = np.arange(max_width)
        self._waited, self._turn = 0, 0  # choices since one beside the best was tried, and tries
        self._known = 0  # forwards whose cost was seen when one was tried for that
        self._tokens, self._ends = 0.0, 0.0  # of the last schedules: emitted, requests that ended
        # Seconds of a schedule outside of its forwards, and of its first one beyond its rows.
        self._between, self._first = 0.0, 0.0

    def observe_schedule(self, forwards: list[tuple[int, float]], seconds: float | None) -> None:
        """Learn from a schedule.

        The first forward begins on a machine that did something else, and holds what vLLM does
        beside it.

        Args:
            forwards: rows and seconds of each.
            seconds: of the schedule, from the end of the one before; None: the first of its
                forwards is not among `forwards`.
        """
        later = forwards if seconds is None else forwards[1:]
        for rows, own in later:
            self.cost.observe(rows, own)
        if seconds is None:
            return
        rows, own = forwards[0]
        expected = self.cost.seconds(rows)
        if later:
            more = min(own - expected, 3 * expected)  # what took longer was held up
            self._first += _NEAR * (more - self._first)
        else:
            self.cost.observe(rows, max(own - self._first, own / 4))
        took = sum(own for _, own in forwards)
        between = min(seconds - took, _MOST_BETWEEN)  # a machine may have stood still
        self._between += _NEAR * (between - self._between)

    def observe_ends(self, tokens: int, ended: int) -> None:
        """Learn from what a schedule emitted, and how many requests ended in it."""
        self._tokens = _MEMORY * self._tokens + tokens
        self._ends = _MEMORY * self._ends + ended
        self._reached = None

    def observe(self, seen: Verified) -> None:
        """Learn from texts that were verified in one or several forwards."""
        # Others draft nothing; behind a seed alone nothing was drafted before.
        drafted = (seen.width > 1) & (seen.text > 1)
        if not drafted.any():
            return
        seen = Verified._make(field[drafted] for field in seen)
        near = 1 - _MEMORY if self._tried.any() else 1.0
        self._gives += near * (float(seen.drafts.mean()) - self._gives)
        drafts = (seen.rows - seen.text) / (seen.width - 1)
        for chance in set(seen.chance.tolist()):
            own = (seen.chance == chance) & (seen.drafts > 0)
            if own.any() and chance < 1:
                found = float(drafts[own].sum()), int(seen.hit[own].sum()), int(own.sum())
                self._break_points.observe(chance, *found)
        for width in set(seen.width.tolist()):
            own = seen.width == width
            # Where limits shorten a text, of that.
            text = np.where(seen.survival > 0, seen.text, width)[own]
            expected = float(np.array(self._sums())[text - 1].sum())
            self._expected[width] = _MEMORY * self._expected[width] + expected
            self._held[width] = _MEMORY * self._held[width] + int(seen.accepted[own].sum())
        accepted = seen.accepted[:, None]
        tried = self._columns < np.minimum(accepted + 1, seen.text[:, None])
        self._tried = _MEMORY * self._tried + tried.sum(0)
        self._right = _MEMORY * self._right + (tried & (self._columns < accepted)).sum(0)
        self._reached = None

    def _sums(self) -> list[float]:
        """Tokens expected of texts of 1, 2, ... columns, the token behind those that hold among
        them. What lies behind the end of a text is of no use."""
        if self._reached is None:
            going_on = 1 - min(self._ends / max(self._tokens, 1), 1)
            right, tried = self._right[1:], self._tried[1:]
            holds = going_on * (right + _DOUBT * _GUESS) / (tried + _DOUBT)
            self._reached = [1.0, *(1 + holds.cumprod().cumsum()).tolist()]
        return self._reached

    def _whole(self, text: int) -> float:
        """Tokens expected of a round by the columns that hold."""
        return self._sums()[text - 1]

    def _text(self, width: int, survival: float) -> int:
        """Columns of a draft that hold with this chance at least."""
        sums, columns = self._sums(), range(1, width) if survival else ()
        return next((n for n in columns if sums[n] - sums[n - 1] < survival), width)

    def _forward(self, width: int, limits: Limits, fan_out: int) -> tuple[float, float]:
        """Tokens and rows of a request in a forward where its drafts have `width` columns.

        A round is a forward that verifies, and where the draft is not there yet, one that makes it;
        that gives one token where drafts are made in the forwards that read it.
        """
        if width == 1:
            return 1.0, self.max_width if self.static else 1.0
        text = self._text(width, limits.survival)
        drafts, hits = self._break_points.expected(limits.chance, fan_out)
        # Columns are not independent, nor are ends: what rounds gave over what was expected.
        doubt = _DOUBT_ROUNDS * self._whole(width)
        ratio = (self._held[width] + doubt) / (self._expected[width] + doubt)
        missing = 1 - hits
        tokens = (self._whole(text) * ratio + missing * self._gives) / (1 + missing)
        rows = (text + drafts * (width - 1) + missing * width) / (1 + missing)
        return tokens, self.max_width if self.static else rows

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
        return seconds + max(self._between + self._first, 0.0) / forwards

    def expected(
        self, width: int, num_requests: int, other_rows: int, fan_out: int = 0
    ) -> Expected:
        """Of forwards of so many requests whose drafts have `width` columns, with the best limits
        found.

        A draft behind a break point saves its request a forward if the text breaks off there, a
        column of a text gives it a token if it holds; either costs all requests of the batch time.

        Args:
            other_rows: rows of other requests in a forward.
            fan_out: most break points for which a draft is made.
        """
        adapts = fan_out > 0 and width > 1 and not self.static
        limits = ALL if self.static or not fan_out else NOTHING_MORE
        found = []
        whole = num_requests * (width - 1)
        for _ in range(_TURNS if adapts else 1):
            tokens, own = self._forward(width, limits, fan_out)
            rows = round(num_requests * own) + other_rows
            seconds = self._seconds(width, tokens, num_requests, rows)
            found.append(Expected(tokens, rows, tokens / seconds, limits))
            if adapts:
                more = (self.cost.seconds(rows + whole) - self.cost.seconds(rows)) / seconds
                _, hits = self._break_points.expected(limits.chance, fan_out)
                limits = Limits(more * (2 - hits), more / (width - 1) * tokens)
        return max(found, key=lambda expected: expected.speed)

    def choose(self, num_requests: int, other_rows: int, fan_out: int = 0) -> int:
        """The width of the next canvases.

        Args:
            num_requests: `auto` requests in the batch.
            other_rows: rows of the other requests in a forward.
            fan_out: most break points for which a draft is made.
        """
        found = {
            width: self.expected(width, num_requests, other_rows, fan_out) for width in self.widths
        }
        best = max(found, key=lambda width: found[width].speed)
        if found[best].speed > _HYSTERESIS * found[self.width].speed:
            self.width = best
        return self._probe(found) or self.width

    def _probe(self, found: dict[int, Expected]) -> int | None:
        """A width to try: what is never tried is never known to have become better."""
        now, seconds = found[self.width], self.cost.seconds

        def lost(width: int) -> float:
            """In forwards of the present width."""
            other = found[width]
            return seconds(other.rows) / seconds(now.rows) * (1 - other.speed / now.speed)

        # By turns the two next to it.
        beside = self.widths.index(self.width) + (1 if self._turn % 2 else -1)
        probe = self.widths[min(max(beside, 0), len(self.widths) - 1)]
        self._waited += 1
        if self._waited >= max(_PROBE_EVERY, _PROBE_LOSES * lost(probe)):
            self._waited, self._turn = 0, self._turn + 1
            return probe
        # What forwards of so many rows cost is only guessed: one may show that they pay.
        for width in self.widths if self.cost.num_seen > self._known else ():
            doubt = self.cost.doubt(found[width].rows)
            pays = found[width].speed > (1 - doubt) * now.speed
            if width != self.width and doubt > _UNSURE and pays and lost(width) < _MOST_LOST:
                self._known = self.cost.num_seen
                return width
        return None
