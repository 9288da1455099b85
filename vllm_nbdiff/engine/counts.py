# SPDX-License-Identifier: Apache-2.0
"""What the forwards of a schedule cost and found, request by request, on the way to the scheduler.

The worker's sampler returns a `CountedOutput`; `compat.carry_counts` brings its counts to the
scheduler beside the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.output import SamplerOutput

Value = TypeVar("Value", int, Tensor)


class Counts(NamedTuple, Generic[Value]):
    """Of one request (int), or of all B requests of a schedule ([B] whole numbers)."""

    forwards: Value
    """Model forwards that computed the request's canvas or text."""
    rows: Value
    """Rows of these forwards."""
    guesses: Value
    """Seeds that were guessed and put to the test."""
    hits: Value
    """Guessed seeds that were right."""
    singles: Value
    """Forwards of one row: autoregressive steps."""
    drafted: Value
    """Tokens drafted for verification."""
    accepted: Value
    """Drafted tokens that verification accepted."""
    fan_outs: Value
    """Drafts made for break points of drafted texts, in the forwards that verified these."""
    fan_hits: Value
    """Drafted texts that broke off where such a draft was there."""
    broken: Value
    """Needed rows of logits with a NaN or an infinity, or 1 where a matcher failed: the request
    ends with an error."""
    stuck: Value
    """1 where a grammar and the other constraints leave no token: the request is aborted."""


@dataclass
class CountedOutput(SamplerOutput):
    """A sampler's output with counts."""

    counts: Tensor | None = None
    """[B, number of fields of `Counts`] int32, on the model's device."""
    graph: str | None = None
    """Which of `compat.metrics.GRAPHS` the forward ran in; None: shapes are not static."""


class Tally:
    """What the forwards of one schedule add up to."""

    def __init__(self, verifies: Tensor) -> None:
        """With which of the B requests verify their texts, [B] bool."""
        self._verifies = verifies
        self._rows: list[Tensor] = []
        self._guesses: list[tuple[Tensor, Tensor]] = []
        self._texts: list[tuple[Tensor, Tensor]] = []
        self._fan_outs: list[tuple[Tensor, Tensor]] = []
        self.broken: Tensor | None = None
        """[B] int64, broken rows; None: there are none."""
        self._stuck: Tensor | None = None

    def add_forward(self, lengths: Tensor) -> None:
        """A forward with segments of `lengths` [B, S]."""
        self._rows.append(lengths)

    def add_guesses(self, guessed: Tensor, right: Tensor) -> None:
        """Whose seeds were guessed, and were right, [B] bool each."""
        self._guesses.append((guessed, right))

    def add_texts(self, read: Tensor, held: Tensor) -> None:
        """Columns of texts that were read, and of them those that held, [B] int64 each."""
        self._texts.append((read, held))

    def add_fan_outs(self, made: Tensor, hit: Tensor) -> None:
        """Drafts made for break points, [B] int64, and whose texts broke off at one, [B] bool."""
        self._fan_outs.append((made, hit))

    def add_broken(self, rows: Tensor) -> None:
        """Rows of broken logits, [B] int64."""
        self.broken = rows if self.broken is None else self.broken + rows

    def add_stuck(self, flags: Tensor) -> None:
        """1 for requests that nothing is left for, [B] int64."""
        self._stuck = flags

    def columns(self, decodes: Tensor) -> Tensor:
        """`CountedOutput.counts` of requests of which those of `decodes` [B] bool have canvases."""
        rows = _stacked([lengths.sum(1) for lengths in self._rows])
        none = torch.zeros_like(rows[0])
        guesses, hits = self._sums(self._guesses, none)
        drafted, accepted = self._drafts(none)
        fan_outs, fan_hits = self._sums(self._fan_outs, none)
        counts = Counts(
            forwards=decodes * len(rows),
            rows=_summed(rows),
            guesses=guesses,
            hits=hits,
            singles=_summed((rows == 1) & decodes),
            drafted=drafted,
            accepted=accepted,
            fan_outs=fan_outs,
            fan_hits=fan_hits,
            broken=none if self.broken is None else self.broken,
            stuck=none if self._stuck is None else self._stuck,
        )
        return torch.stack(counts, dim=1).int()

    def _drafts(self, none: Tensor) -> list[Tensor]:
        """[B] int64 each: tokens of verified drafts, behind their seeds, and those that held."""
        if not self._texts:
            return [none, none]
        read, held = (_stacked(lengths) for lengths in zip(*self._texts, strict=True))
        drafted = self._verifies & (read > 0)
        return [_summed(torch.where(drafted, lengths - 1, 0)) for lengths in (read, held)]

    @staticmethod
    def _sums(pairs: list[tuple[Tensor, Tensor]], none: Tensor) -> tuple[Tensor, Tensor]:
        if not pairs:
            return none, none
        one, other = (_summed(_stacked(values)) for values in zip(*pairs, strict=True))
        return one, other


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """[n, B] of n tensors [B]; of one nothing is copied."""
    return values[0][None] if len(values) == 1 else torch.stack(list(values))


def _summed(values: Tensor) -> Tensor:
    """[B] int64 of [n, B]; of one row nothing is added."""
    return values[0].long() if len(values) == 1 else values.sum(0)


def count_nans(logits: Tensor, owner: Tensor, num_reqs: int) -> Tensor:
    """NaNs in the logits of each request.

    vLLM's own count has one row of logits for each request.

    Args:
        logits: [n, V], as the model gives them.
        owner: [n] int64, batch index of the request that each row belongs to.
        num_reqs: B.

    Returns:
        [B] int32.
    """
    nans = logits.isnan().sum(dim=1, dtype=torch.int32)
    return nans.new_zeros(num_reqs).index_add_(0, owner, nans)
