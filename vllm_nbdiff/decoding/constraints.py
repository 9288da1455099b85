# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters that change a row's logits, for the requests that use them.

Order and meaning are vLLM's: allowed_token_ids, logit_bias, min_tokens, penalties, bad_words; a
thinking budget, which comes last, has the meaning of Nemotron-Labs-Diffusion's own code. What vLLM
reads from the tokens generated so far is read here from the committed tokens and the filled
positions of the canvas.

n rows of one request or of several, canvases of L columns; nothing is read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_nbdiff.decoding.bad_words import BadWords


class Thinking(NamedTuple):
    """How many tokens a request may think, and how thinking ends."""

    budget: int
    end_token_id: int
    looks_at_seed: bool = False
    """Whether the end may be the seed of the block in which the budget is spent. Not in Nemotron's
    own code, which then writes it twice; a grammar takes it once."""


class Context(NamedTuple):
    """What n rows of logits see and predict."""

    slot: Tensor  # [n] int64
    text_end: Tensor  # [n] int64, committed tokens
    canvas: Tensor  # [n, L] int64
    known: Tensor  # [n, L] bool, columns that are seen
    position: Tensor  # [n] int64, absolute position predicted
    follows: Tensor  # [n] bool, it follows everything that is seen, as in AR decoding

    def rows(self, chosen: slice) -> Context:
        """Some of the rows."""
        return Context(*(field[chosen] for field in self))


@dataclass
class Constraints:
    """The constraints of one request, on the model's device."""

    prompt_length: int
    allowed: Tensor | None  # [V] bool
    bias: tuple[Tensor, Tensor] | None  # token ids [k] int64, float32
    min_tokens: int
    stop_ids: Tensor | None  # [k] int64, banned before min_tokens
    repetition: float
    frequency: float
    presence: float
    bad_words: list[BadWords]
    thinking: Thinking | None

    @property
    def penalized(self) -> bool:
        """Whether any penalty is in force."""
        return self.repetition != 1 or self.frequency != 0 or self.presence != 0

    @property
    def any(self) -> bool:
        """Whether anything is in force."""
        others = (self.allowed, self.bias, self.stop_ids)
        return self.penalized or self.reads_text or any(one is not None for one in others)

    @property
    def reads_text(self) -> bool:
        """Whether `after_penalties` reads the tokens so far."""
        return bool(self.bad_words) or self.thinking is not None

    def before_penalties(self, logits: Tensor, context: Context) -> None:
        """Change rows [n, V] float32 of this request in place."""
        if self.allowed is not None:
            logits.masked_fill_(~self.allowed, -torch.inf)
        if self.bias is not None:
            ids, bias = self.bias
            logits.index_add_(1, ids, bias.expand(len(logits), len(bias)))
        if self.stop_ids is not None:
            early = context.position - self.prompt_length < self.min_tokens
            banned = torch.where(early, -torch.inf, 0.0)[:, None]
            logits.index_add_(1, self.stop_ids, banned.expand(-1, len(self.stop_ids)))

    def after_penalties(self, logits: Tensor, context: Context, text: Tensor) -> None:
        """The same; `text` [n, T] int64 holds the requests' committed tokens."""
        for words in self.bad_words:
            line = words.line(context.text_end, context.canvas, context.known, text)
            words.ban(logits, line, context.position)
        if self.thinking is not None:
            budget, end = self.thinking.budget, self.thinking.end_token_id
            ended = self.has_thought(text, context.text_end)
            ended |= ((context.canvas == end) & context.known).any(1)
            spent = context.position - self.prompt_length >= budget
            forced = (context.follows & spent & ~ended)[:, None]
            logits.masked_fill_(forced, -torch.inf)
            logits[:, end : end + 1].masked_fill_(forced, 0.0)

    def has_thought(self, text: Tensor, text_end: Tensor) -> Tensor:
        """[n] bool: whether the output among the first `text_end` [n] of `text` [n, T] int64 holds
        the end of thinking."""
        assert self.thinking is not None
        places = torch.arange(text.shape[1], device=text.device)
        output = (places >= self.prompt_length) & (places < text_end[:, None])
        return (output & (text == self.thinking.end_token_id)).any(1)


class Penalties(NamedTuple):
    """Of n rows."""

    repetition: Tensor  # [n, 1] float32
    frequency: Tensor
    presence: Tensor
    prompt_length: Tensor  # [n, 1] int64

    def applied(self, logits: Tensor, count: Tensor) -> Tensor:
        """Logits [n, k] of tokens that were seen, `count` [n, k] times in the output."""
        logits = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
        return logits - self.frequency * count - self.presence * (count > 0)


def penalize(
    logits: Tensor, penalties: Penalties, context: Context, text: Tensor, mask_token_id: int
) -> None:
    """Penalize the tokens that rows have seen, in place.

    Repetition counts the prompt too; presence and frequency the output alone.

    Args:
        logits: [n, V] float32.
        penalties: of the rows.
        context: of the rows.
        text: [n, T] int64, committed tokens of the rows' requests; read before `text_end`.
        mask_token_id: no column that is known holds it.
    """
    places = torch.arange(text.shape[1], device=text.device)
    committed = places < context.text_end[:, None]
    first = text[:, :1]  # stands in for what is not committed
    text = torch.where(committed, text, first)
    output = committed & (places >= penalties.prompt_length)
    counts = torch.zeros_like(logits, dtype=torch.int32)
    counts.scatter_add_(1, text, output.to(torch.int32))
    canvas = torch.where(context.known, context.canvas, mask_token_id)
    same = (canvas[:, :, None] == canvas[:, None, :]) & context.known[:, None, :]
    # The tail of a prompt may lie in the canvas.
    columns = torch.arange(canvas.shape[1], device=canvas.device)
    same &= (context.text_end[:, None] + columns >= penalties.prompt_length)[:, None]
    in_canvas = counts.gather(1, canvas) + same.sum(2)
    # Equal tokens get equal values, so it does not matter which of them is written last.
    of_canvas = penalties.applied(logits.gather(1, canvas), in_canvas)
    of_text = penalties.applied(logits.gather(1, text), counts.gather(1, text))
    logits.scatter_(1, text, of_text)
    logits.scatter_(1, canvas, torch.where(context.known, of_canvas, logits.gather(1, canvas)))
