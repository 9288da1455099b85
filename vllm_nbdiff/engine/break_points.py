# SPDX-License-Identifier: Apache-2.0
"""How many drafts are made behind break points of a text, and how often the next one is among them,
learned while serving."""

from __future__ import annotations

from bisect import bisect_right

# What is drafted for break points is learned apart where only those are worth it that are likelier.
_CHANCES = (0.02, 0.05, 0.1, 0.2, 0.4)
# Drafts a text, and hits, before anything is known, how many texts outweigh that, and what is kept
# of what is known when others are verified.
_LIKELY = ((3.0, 0.7), (2.2, 0.6), (1.6, 0.5), (1.2, 0.4), (0.8, 0.3), (0.35, 0.15))
_DOUBT_TEXTS, _KNOWN = 5, 0.99


class BreakPoints:
    """Drafts behind break points of a text, by how likely one must be to have a draft."""

    def __init__(self) -> None:
        # By `_CHANCES`, of the last texts: drafts, hits, and how many texts they were.
        self._seen = [[0.0, 0.0, 0.0] for _ in _LIKELY]

    def observe(self, chance: float, drafts: float, hits: int, texts: int) -> None:
        """Learn from texts: drafts, and how often the next one was among them."""
        # What is not tried for long is forgotten, and tried again.
        self._seen = [[_KNOWN * value for value in own] for own in self._seen]
        own = self._seen[bisect_right(_CHANCES, chance)]
        for place, value in enumerate((drafts, hits, texts)):
            own[place] += value

    def expected(self, chance: float, most: int) -> tuple[float, float]:
        """Drafts a text, at most so many, and how often the next one is among them."""
        if chance >= 1 or not most:
            return 0.0, 0.0
        place = bisect_right(_CHANCES, chance)
        drafts, hits, texts = self._seen[place]
        likely, hit = _LIKELY[place]
        texts += _DOUBT_TEXTS
        drafts, hits = drafts + _DOUBT_TEXTS * likely, hits + _DOUBT_TEXTS * hit
        # Of fewer drafts than were made the likeliest remain.
        share = min(most * texts / drafts, 1)
        return share * drafts / texts, share**0.5 * hits / texts
