# SPDX-License-Identifier: Apache-2.0
"""A time limit shared by the parts of a run."""

from __future__ import annotations

from time import perf_counter


class Budget:
    """Gives every part an equal share of the time that is left when it begins.

    What a part does not use goes to those after it; what it takes beyond its share they go without.
    """

    def __init__(self, seconds: float, parts: int) -> None:
        self._end = self._share_ends = perf_counter() + seconds
        self._parts = parts

    def begin_part(self) -> None:
        """The next of the parts begins."""
        now = perf_counter()
        self._share_ends = now + (self._end - now) / self._parts
        self._parts -= 1

    def has(self, seconds: float) -> bool:
        """Whether so many seconds are left of the part's share."""
        return perf_counter() + seconds <= self._share_ends
