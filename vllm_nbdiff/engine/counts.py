# SPDX-License-Identifier: Apache-2.0
"""What a request's forwards of one schedule cost, as the one integer the worker can report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_nbdiff.engine.decoder import Emitted

_ROWS, _GUESSES, _HITS, _SINGLES = 12, 32, 42, 52


@dataclass(frozen=True)
class Counts:
    """Of one request."""

    forwards: int
    rows: int
    guesses: int
    hits: int
    singles: int


def pack(emitted: Emitted) -> np.ndarray:
    """[B] int64: bit fields of forwards (12 bits), rows (20), guesses, hits (10) and singles."""
    return (
        emitted.forwards
        | emitted.rows << _ROWS
        | emitted.guesses << _GUESSES
        | emitted.hits << _HITS
        | emitted.singles << _SINGLES
    )


def pack_uniform(rows: np.ndarray) -> np.ndarray:
    """[B] int64 of one forward for each request, of `rows` [B] rows; 0: not to be counted."""
    rows = rows.astype(np.int64)
    return (rows > 0) | rows << _ROWS | (rows == 1).astype(np.int64) << _SINGLES


def unpack(value: int) -> Counts:
    """The counts of one request."""
    return Counts(
        forwards=value & 0xFFF,
        rows=value >> _ROWS & 0xFFFFF,
        guesses=value >> _GUESSES & 0x3FF,
        hits=value >> _HITS & 0x3FF,
        singles=value >> _SINGLES,
    )
