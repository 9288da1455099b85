# SPDX-License-Identifier: Apache-2.0
"""A grammar of vLLM behind the text of one request: what may follow, and back to the text.

Where a model thinks before it answers, the grammar is the answer's: thoughts are free.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

    from vllm_nbdiff.compat import Thoughts


class NothingFits(Exception):
    """The grammar and the other constraints of a request leave no token."""


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
        # Tokens behind the final text: that the grammar has accepted, and that were thought.
        self._ahead = self._thought_ahead = 0
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
        return self._thoughts is not None and self._thoughts.go_on

    def allowed(self) -> Tensor:
        """[1, ceil(V / 32)] int32: a bit for each token that may come next; valid until the next
        call."""
        grammar, bits = self._compiled.result()
        grammar.fill_bitmask(bits, 0)
        return bits

    def accepts(self, token: int) -> bool:
        """Move past `token` if it may come next."""
        if self.thinks:
            assert self._thoughts is not None
            if self._thoughts.take(token) and not self._fits(token):
                self._thoughts.back(1)
                return False
            self._thought_ahead += 1
            return True
        return self.has_ended or self._fits(token)

    def _fits(self, token: int) -> bool:
        legal = bool(self._grammar.validate_tokens([token]))
        if not legal and token in self._stops:
            # llguidance validates nothing where only the end may follow.
            legal = bool(self.allowed()[0, token // 32] >> (token % 32) & 1)
        if legal:
            self._grammar.accept_tokens("", [token])
            self._ahead += 1
        return legal

    def follow(self, tokens: list[int]) -> None:
        """Go back to the final text, which has grown by `tokens`."""
        if self._ahead:
            self._grammar.rollback(self._ahead)
        if self._thoughts is not None:
            self._thoughts.back(self._thought_ahead)
        if not all(self.accepts(token) for token in tokens):
            raise NothingFits
        self._ahead = self._thought_ahead = 0
        self.position += len(tokens)
