# SPDX-License-Identifier: Apache-2.0
"""Words that must not appear, whichever of their positions is filled last.

A row's line: the last M - 1 committed tokens, M being the longest word, the canvas, and M unknown
positions behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_nbdiff.decoding.canvas import NO_TOKEN


class Line(NamedTuple):
    """What surrounds the canvas of n rows, N positions each."""

    tokens: Tensor  # [n, N] int64
    known: Tensor  # [n, N] bool
    first: Tensor  # [n] int64, absolute position of the first one


def group_words(words: Iterable[Sequence[int]]) -> list[list[list[int]]]:
    """Words of like lengths together, so that none costs what a longer one does.

    Args:
        words: token ids of each, none empty.

    Returns:
        what `BadWords` takes, for each group.
    """
    groups: dict[int, list[Sequence[int]]] = {}
    for word in words:
        groups.setdefault((len(word) - 1).bit_length(), []).append(word)
    return [_padded(group) for group in groups.values()]


def _padded(words: list[Sequence[int]]) -> list[list[int]]:
    longest = max(map(len, words))
    return [[*word, *[NO_TOKEN] * (longest - len(word))] for word in words]


class BadWords:
    """W words of one request, of at most M tokens."""

    def __init__(self, words: Tensor) -> None:
        """With `words` [W, M] int64 on the model's device, NO_TOKEN behind the shorter ones."""
        self.words = words.clamp(min=0)
        self.beyond = words == NO_TOKEN  # [W, M]
        self.places = torch.arange(words.shape[1], device=words.device)

    def line(self, text_end: Tensor, canvas: Tensor, known: Tensor, text: Tensor) -> Line:
        """The lines of n rows, of M - 1 + L + M positions.

        Args:
            text_end: [n] int64, committed tokens.
            canvas: [n, L] int64; known: [n, L] bool.
            text: [n, T] int64.
        """
        longest = len(self.places)
        first = text_end - (longest - 1)
        positions = first[:, None] + self.places[:-1]
        before = text.gather(1, positions.clamp(0, text.shape[1] - 1))
        behind = torch.zeros_like(canvas[:, :1]).expand(-1, longest)
        tokens = torch.cat([before, canvas, behind], dim=1)
        seen = torch.cat([positions >= 0, known, behind.bool()], dim=1)
        return Line(tokens, seen, first)

    def _matches(self, line: Line, begin: Tensor) -> Tensor:
        """[n, W, p, M] bool: whether each word's tokens stand from places `begin` [n, p] on."""
        rows = torch.arange(len(begin), device=begin.device)[:, None, None]
        at = (begin[:, :, None] + self.places).clamp(0, line.tokens.shape[1] - 1)
        seen = line.known[rows, at] & (begin >= 0)[:, :, None]
        equal = line.tokens[rows, at][:, None] == self.words[:, None, :]
        return (equal & seen[:, None]) | self.beyond[:, None]

    def ban(self, logits: Tensor, line: Line, position: Tensor) -> None:
        """Ban, in place, the tokens that would complete a word.

        Args:
            logits: [n, V] float.
            line: of the rows.
            position: [n] int64, absolute position predicted.
        """
        begin = (position - line.first)[:, None] - self.places  # as the word's p-th token
        itself = torch.eye(len(self.places), dtype=torch.bool, device=logits.device)
        complete = (self._matches(line, begin) | itself).all(3)
        complete &= ~self.beyond & (begin >= 0)[:, None]
        bans = torch.where(complete, -torch.inf, 0.0).flatten(1)
        logits.scatter_add_(1, self.words.flatten().expand(len(logits), -1), bans)

    def undo(
        self,
        accepted: Tensor,
        known: Tensor,
        canvas: Tensor,
        rank: Tensor,
        end: Tensor,
        text: Tensor,
    ) -> Tensor:
        """[L] bool: `accepted` columns without the least confident one of every word they form.

        One position alone cannot complete a word (`ban`), so the most confident one is kept.

        Args:
            accepted: [L] bool, columns to be filled.
            known: [L] bool, columns that are filled.
            canvas: [L] int64, with the accepted ones filled.
            rank: [L] float, their confidence.
            end: [] int64, committed tokens.
            text: [T] int64, the request's tokens.
        """
        length, lead = len(canvas), len(self.places) - 1
        line = self.line(end[None], canvas[None], (known | accepted)[None], text[None])
        begin = torch.arange(length + lead, device=canvas.device)
        formed = self._matches(line, begin[None])[0].all(2)  # [W, p]
        columns = begin[:, None] + self.places - lead  # [p, M]
        inside = ((columns >= 0) & (columns < length))[None] & ~self.beyond[:, None]
        fresh = inside & accepted[columns.clamp(0, length - 1)]
        confidence = rank[columns.clamp(0, length - 1)].masked_fill(~fresh, torch.inf)
        least = columns.expand_as(confidence).gather(2, confidence.argmin(2, keepdim=True))[..., 0]
        drop = formed & fresh.any(2)
        dropped = torch.zeros(length + 1, dtype=torch.bool, device=canvas.device)
        dropped.index_fill_(0, torch.where(drop, least, length).flatten(), True)
        return accepted & ~dropped[:length]
