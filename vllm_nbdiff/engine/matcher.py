# SPDX-License-Identifier: Apache-2.0
"""A grammar of vLLM behind the text of one request: what may follow, and back to the text.

Where a model thinks before it answers, the grammar is the answer's: thoughts are free.
"""

from __future__ import annotations

import enum
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

    from vllm_nbdiff.compat import Thoughts


class Failure(enum.Enum):
    """Why a request cannot go on."""

    BROKEN = enum.auto()
    """Its matcher failed."""
    REFUSED = enum.auto()
    """A token that is drawn, as none fits, is refused: what the forward reads has no meaning."""
    LOST = enum.auto()
    """No token fits behind its text, which is legal."""


class NothingFits(Exception):
    """The grammar and the other constraints of a request leave no token."""


class Passed(NamedTuple):
    """A token that a matcher has moved past."""

    token: int
    thought: bool  # it is counted among the thoughts
    matched: bool  # the grammar has accepted it


class Matcher:
    """A grammar behind the text of one request."""

    def __init__(
        self,
        compiled: Future[tuple[StructuredOutputGrammar, Tensor]],
        prompt_length: int,
        stops: set[int],
        thoughts: Thoughts | None = None,
    ) -> None:
        """
        Args:
            compiled: a grammar of vLLM, at its beginning, and [1, ceil(V / 32)] int32, which it can
                fill; waited for when it is asked first.
            prompt_length: tokens before the text.
            stops: tokens that may end the text.
            thoughts: before the text that the grammar is for, where there are some.
        """
        self._compiled = compiled
        self._stops = stops
        self._thoughts = thoughts
        self._line: list[Passed] = []
        """What was accepted behind the final text."""
        self._cursor = 0  # how much of it stands before what is asked about
        self.prompt_length = prompt_length
        self.position = prompt_length
        """Of the first token that is not final, as far as the matcher knows."""

    @cached_property
    def _grammar(self) -> StructuredOutputGrammar:
        return self._compiled.result()[0]

    @property
    def has_ended(self) -> bool:
        """Whether the text has: whatever follows is not constrained."""
        return not self.thinks and self._grammar.is_terminated()

    @property
    def constrains(self) -> bool:
        """Whether the grammar says what comes next."""
        return not (self.thinks or self.has_ended)

    @property
    def thinks(self) -> bool:
        """Whether the grammar has not begun: what comes next is not constrained."""
        self._settle()
        return self._thoughts is not None and self._thoughts.go_on

    @cached_property
    def _bits(self) -> tuple[Tensor, np.ndarray]:
        bits = self._compiled.result()[1]
        return bits, bits.numpy()

    def allowed(self) -> np.ndarray:
        """[1, ceil(V / 32)] int32: a bit for each token that may come next; valid until the next
        call."""
        self._settle()
        bits, array = self._bits
        self._grammar.fill_bitmask(bits, 0)
        return array

    def accepts(self, token: int) -> bool:
        """Move past `token` if it may come next."""
        # A canvas that has grown begins with what was accepted before.
        if self._cursor < len(self._line) and self._line[self._cursor].token == token:
            self._cursor += 1
            return True
        passed = self._pass(token)
        if passed is not None:
            self._line.append(passed)
            self._cursor += 1
        return passed is not None

    def _pass(self, token: int) -> Passed | None:
        if self.thinks:
            assert self._thoughts is not None
            is_answer = self._thoughts.take(token)
            if is_answer and not self._fits(token):
                self._thoughts.back(1)
                return None
            return Passed(token, thought=True, matched=is_answer)
        if self.has_ended:
            return Passed(token, thought=False, matched=False)
        return Passed(token, thought=False, matched=True) if self._fits(token) else None

    def _fits(self, token: int) -> bool:
        legal = bool(self._grammar.validate_tokens([token]))
        if not legal and token in self._stops:
            # llguidance validates nothing where only the end may follow.
            legal = bool(self.allowed()[0, token // 32] >> (token % 32) & 1)
        if legal:
            self._grammar.accept_tokens("", [token])
        return legal

    def follow(self, tokens: list[int]) -> None:
        """Go back to the final text, which has grown by `tokens`."""
        self._cursor = 0
        if not all(self.accepts(token) for token in tokens):
            raise NothingFits
        del self._line[: len(tokens)]
        self._cursor = 0
        self.position += len(tokens)

    def _settle(self) -> None:
        """Forget what was accepted behind the place that is asked about."""
        behind = self._line[self._cursor :]
        if not behind:
            return
        del self._line[self._cursor :]
        if matched := sum(passed.matched for passed in behind):
            self._grammar.rollback(matched)
        if self._thoughts is not None:
            self._thoughts.back(sum(passed.thought for passed in behind))


def apply_bits(logits: Tensor, bits: Tensor, rows: list[int]) -> None:
    """Ban, in `rows` of logits [n, V], tokens whose bit in `bits` [n, W] int32 is 0, in place."""
    import xgrammar

    bits = bits.to(logits.device, non_blocking=True)
    xgrammar.apply_token_bitmask_inplace(logits, bits, indices=rows)
