# SPDX-License-Identifier: Apache-2.0
"""How much is drafted: the width of drafts in mode `auto`, and wherever drafts are made while the
text before them is verified, what is worth its rows.

All choices verify, so the text is always that of AR decoding; width 1 is AR decoding itself. The
best choice gives the most accepted tokens a second: rows are nearly free while a forward is bound
by reading weights, and cost their arithmetic beyond that. Both sides are measured: a forward's time
by rows, and the acceptance, while serving.
"""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_nbdiff.decoding.emitted import Emitted
from vllm_nbdiff.engine.cost import CostModel
from vllm_nbdiff.engine.options import OptionTable
from vllm_nbdiff.engine.ranks import Agree
from vllm_nbdiff.engine.schedule import Schedule
from vllm_nbdiff.request_options import DEFAULT_DRAFT_LENGTH

WIDTHS = (1, 8, 16, 32)
_NEAR = 0.2  # weight of a forward in host time
_MEMORY = 0.98  # weight of what was known when drafts are verified, or a schedule ends
# Chance of a column that nothing is known of, and how many tries outweigh that.
_GUESS, _DOUBT = 0.9, 0.1
_HYSTERESIS = 1.05
_PROBE_EVERY, _HOPELESS = 32, 0.25


class Verified(NamedTuple):
    """What the texts that a forward verified showed, [n] int64 each."""

    width: np.ndarray  # columns of the canvas
    text: np.ndarray  # of them that were verified
    accepted: np.ndarray  # of them that held
    hit: np.ndarray  # 1: the next draft was made in the same forward
    rows: np.ndarray  # of the request in the forward
    fan_out: np.ndarray  # 1: a draft might have been


class Limits(NamedTuple):
    """What of a batch's drafts is worth its rows."""

    chance: float  # of a break point for which a draft is made, at least
    survival: float  # chance that a column and all before it hold, at least, to be verified


class DraftChooser:
    """Chooses one width for all `auto` requests of a batch, and what is verified and drafted."""

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
        self.width = max(width for width in self.widths if width <= DEFAULT_DRAFT_LENGTH)
        # How often a drafted column was right, of the times that all before it were.
        self._tried, self._right = np.zeros(max_width), np.zeros(max_width)
        # By width: how often the next draft was there already, how often the forward that makes it
        # otherwise gives a token, and rows a column of a request's forwards. A width that was not
        # seen yet is taken to be like those that are.
        self._hits = np.full(max_width + 1, 0.5)
        self._gives = np.zeros(max_width + 1)
        self._rows = np.full(max_width + 1, 1.5)
        self._seen = np.zeros(max_width + 1, np.int64)
        self._rows[1], self._seen[1] = 1, 1
        self._choices = 0
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

    def observe(self, seen: Verified) -> None:
        """Learn from the texts that were verified in a forward."""
        for width in np.unique(seen.width[seen.width > 1]).tolist():
            own = Verified(*(field[seen.width == width] for field in seen))
            self._seen[width] += 1
            alike = self._seen == 0
            alike[width] = True
            near = max(1 - _MEMORY, 1 / (1 + self._seen[width])) * alike
            self._rows += near * (own.rows.mean() / width - self._rows)
            drafted = own.text > 1
            if drafted.any():  # behind a seed alone nothing was drafted before
                self._hits += near * (own.hit[drafted].mean() - self._hits)
                self._gives += near * (own.fan_out[drafted].mean() - self._gives)
        drafted = (seen.width > 1) & (seen.text > 1)
        if not drafted.any():
            return
        columns = np.arange(self.max_width)
        accepted = seen.accepted[drafted, None]
        tried = columns < np.minimum(accepted + 1, seen.text[drafted, None])
        self._tried = _MEMORY * self._tried + tried.sum(0)
        self._right = _MEMORY * self._right + (tried & (columns < accepted)).sum(0)

    def tokens_per_forward(self, width: int) -> float:
        """Expected of a request whose drafts have `width` columns.

        A round is a forward that verifies, and where the draft is not there yet, one that makes it;
        that gives one token if drafts are made for break points.
        """
        if width == 1:
            return 1.0
        # Columns that hold in a round, the seed among them, and the token behind them.
        right, tried = self._right[1:width], self._tried[1:width]
        whole = 1 + float(np.cumprod((right + _DOUBT * _GUESS) / (tried + _DOUBT)).sum())
        missing = 1 - self._hits[width]
        return (whole + missing * float(self._gives[width])) / (1 + missing)

    def speed(self, width: int, num_requests: int, rows: int) -> float:
        """Expected tokens a second of one request of so many, in forwards of `rows` rows."""
        return self.tokens_per_forward(width) / self._seconds(width, num_requests, rows)

    def _seconds(self, width: int, num_requests: int, rows: int) -> float:
        """Of a forward of `rows` rows, with its share of what happens between schedules.

        A schedule ends where there is no room for more tokens, and with a request.
        """
        tokens = max(self.tokens_per_forward(width), 1)
        most = (self.max_width - width) // tokens + 1
        ends = num_requests * tokens * self._ends / max(self._tokens, 1)
        forwards = min(most, self.max_forwards, 1 / max(-np.expm1(-ends), 1e-9))
        return self.cost.seconds(rows) + self._between / forwards

    def choose(self, num_requests: int, other_rows: int) -> int:
        """The width of the next canvases.

        Args:
            num_requests: `auto` requests in the batch.
            other_rows: rows of the other requests in a forward.
        """
        self._choices += 1
        rows = {
            width: round(num_requests * width * self._rows[width]) + other_rows
            for width in self.widths
        }
        speed = {width: self.speed(width, num_requests, rows[width]) for width in self.widths}
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

    def limits(self, width: int, num_requests: int, rows: int) -> Limits:
        """What is worth its rows where all `num_requests` requests take as much.

        A draft behind a break point saves its request a forward if the text breaks off there, a
        column of a text gives it a token if it holds; either costs all requests of the batch time.

        Args:
            rows: of a forward now.
        """
        if width == 1:
            return Limits(1.0, 0.0)
        seconds = self._seconds(width, num_requests, rows)
        whole = num_requests * (width - 1)
        more = (self.cost.seconds(rows + whole) - self.cost.seconds(rows)) / seconds
        return Limits(
            chance=more * (2 - float(self._hits[width])),
            survival=more / (width - 1) * self.tokens_per_forward(width),
        )


class AutoDrafts:
    """Sets how much requests draft, from what their forwards show.

    On a GPU nothing waits for that: what was accepted is read once it has arrived, and a forward
    takes as long as it is until the next one is decided. What is scheduled there is computed, so
    nothing of it is left out.
    """

    def __init__(
        self, options: OptionTable, steps_per_schedule: int, static: bool, agree: Agree
    ) -> None:
        """
        Args:
            options: of all requests.
            steps_per_schedule: most forwards of a schedule.
            static: nothing may be read back; a schedule is one forward.
            agree: on what is chosen, as what is measured differs between ranks.
        """
        self.options = options
        self.static = static
        self.sets_limits = not static
        self._agree = agree
        self.chooser = DraftChooser(CostModel(), options.config.block_length, steps_per_schedule)
        self._drafting = np.zeros(0, np.bool_)
        self._arriving: list[tuple[torch.cuda.Event, np.ndarray, np.ndarray, Tensor]] = []
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
        self._fans = options.host["fan_out"][slots] > 0
        if self.static:
            self._rows = int(schedule.scheduled.sum())
        if not self._drafting.any():
            return
        while self._arriving and self._arriving[0][0].query():
            _, chosen, fans, numbers = self._arriving.pop(0)
            self._learn(chosen, fans, numbers.numpy())
        own = auto & schedule.decodes
        if auto.any():
            others = int(schedule.scheduled[schedule.decodes & ~auto].sum())
            width = self.chooser.choose(max(int(own.sum()), 1), others)
            options.set_draft_length(slots[auto], int(self._agree(np.array([width]))[0]))
        if self.sets_limits:
            self._set_limits(slots, self._drafting & schedule.decodes)

    def _set_limits(self, slots: np.ndarray, drafting: np.ndarray) -> None:
        count, widths = int(drafting.sum()), self.options.host["block_length"][slots]
        for width in sorted(set(widths[drafting].tolist())):
            limits = self.chooser.limits(width, count, self._rows)
            chance, survival = self._agree(np.array(limits)).tolist()
            self.options.set_limits(slots[drafting & (widths == width)], chance, survival)

    def observe_drafts(self, read: tuple[Tensor, ...] | None) -> None:
        """Learn from verified texts: [B] each, the numbers of `Verified`."""
        if read is None or not self._drafting.any():
            return
        numbers = torch.stack(read)
        if numbers.is_cuda:
            event = torch.cuda.Event()
            there = numbers.to("cpu", non_blocking=True)
            event.record()
            self._arriving.append((event, self._drafting, self._fans, there))
        else:
            self._learn(self._drafting, self._fans, numbers.numpy())

    def _learn(self, chosen: np.ndarray, fans: np.ndarray, numbers: np.ndarray) -> None:
        chosen = chosen & (numbers[1] > 0)
        self.chooser.observe(Verified._make((*numbers[:, chosen], fans[chosen].astype(np.int64))))

    def begin_forward(self, rows: int) -> None:
        """Note the rows of a forward that is not the runner's."""
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
