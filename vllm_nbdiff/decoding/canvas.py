# SPDX-License-Identifier: Apache-2.0
"""Decoding state of all requests: tensors on the model's device, rows by slot.

A request's canvas starts where its committed text ends, or, where blocks lie at multiples of their
length, at the last of them before that. Its first columns are known: the seed, or the tail of the
prompt. What comes next follows from the canvas: one with masked positions is denoised, a full one
is committed.

B requests, canvases of L columns; every column of options or state is a tensor [B].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_nbdiff.decoding.plan import Facts

NO_TOKEN = -1
NO_LIMIT = 1 << 30


class Options(NamedTuple):
    """Options of B requests; they change only where `auto` chooses another draft length."""

    block_length: Tensor  # int64; of a verified draft its length
    sub_block_length: Tensor  # int64
    max_steps: Tensor  # int64; where text is verified, denoise steps of a draft
    max_versions: Tensor  # int64, canvases looked at beside the canvas itself
    fan_out: Tensor  # int64, most break points of a verified text for which a draft is made
    last_position: Tensor  # int64, of the last token wanted
    first_stop: Tensor  # int64, position from which on a stop token ends the request
    prompt_length: Tensor  # int64
    rule: Tensor  # int64, place in `rules.RULES`
    score: Tensor  # int64, a score of rules.py
    top_k: Tensor  # int64, the vocabulary size: off
    rng_seed: Tensor  # int64
    max_post_steps: Tensor  # int64, steps that may edit a canvas without masks
    threshold: Tensor  # float32, the rule's parameter
    least_chance: Tensor  # float32, of a break point for which a draft is made
    least_survival: Tensor  # float32, chance of a column and all before it to be verified
    editing_threshold: Tensor  # float32, probability above which a filled position is edited
    temperature: Tensor  # float32
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    verifies: Tensor  # bool, the text is what AR decoding gives
    drafts: Tensor  # bool, makes drafts in the forwards that read text
    fuses: Tensor  # bool, commits in the forward that first denoises the next canvas
    constrained: Tensor  # bool, tokens are banned or their logits changed
    caches: Tensor  # bool, reuses the KV of the rest of the canvas within a sub-block
    splits: Tensor  # bool, a block is split evenly over `max_steps`
    edits: Tensor  # bool, filled positions may be filled again


class Canvas(NamedTuple):
    """State of B requests."""

    tokens: Tensor  # [B, L] int64
    start: Tensor  # int64, position of column 0
    width: Tensor  # int64, columns in use
    step: Tensor  # int64, denoise steps done, those included that versions of it stood for
    guess: Tensor  # int64, the next canvas's seed as the last denoise step predicts it
    cached: Tensor  # int64, first column of the sub-block for which the rest's KV is cached, or -1
    copied: Tensor  # int64, versions whose own pages hold the text before the canvas
    edits_left: Tensor  # int64, steps that may still edit the canvas once it has no masks


class CanvasTable:
    """State of all slots, and a spare one that takes the writes of padding."""

    def __init__(self, num_slots: int, length: int, vocab_size: int, device: torch.device) -> None:
        """
        Args:
            num_slots: largest number of requests.
            length: L, the served block length.
            vocab_size: of the model.
            device: of the model.
        """
        rows = num_slots + 1
        self.tokens = torch.zeros((rows, length), dtype=torch.int64, device=device)
        self.fields = torch.zeros((rows, len(Canvas._fields) - 1), dtype=torch.int64, device=device)
        self.proposed = torch.full_like(self.tokens, NO_TOKEN)
        """What the last step proposed for columns that it left masked, NO_TOKEN elsewhere."""
        self.rank = torch.zeros((rows, length), device=device)
        """Confidence of those; where drafts are made for break points, of the drafted tokens."""
        self.stops = torch.zeros((rows, vocab_size), dtype=torch.bool, device=device)
        """Tokens that end a request: what one lists costs no other anything."""
        self.columns = torch.arange(length, device=device)

    def read(self, slot: Tensor) -> Canvas:
        """State of the requests in `slot` [B]."""
        return Canvas(self.tokens[slot], *self.fields[slot].unbind(1))

    def start(self, slot: Tensor) -> Tensor:
        """[B] int64: where the canvases of the requests in `slot` [B] start."""
        return self.fields[slot, 0]

    def write(self, slot: Tensor, canvas: Canvas) -> None:
        """Store the state of the requests in `slot` [B]; equal slots are padding."""
        self.tokens[slot] = canvas.tokens
        self.fields[slot] = torch.stack(canvas[1:], dim=1)

    def set_stops(self, slot: int, token_ids: Tensor) -> None:
        """Let `token_ids` [n] int64 on the table's device end the request in `slot`."""
        # A number assigned by index would be copied to a GPU, which waits.
        self.stops[slot].zero_().index_fill_(0, token_ids, True)

    def forget_proposals(self, slot: int) -> None:
        """Of the request that was in `slot` before."""
        self.proposed[slot].fill_(NO_TOKEN)

    def is_last(self, slot: Tensor, options: Options, tokens: Tensor, positions: Tensor) -> Tensor:
        """Whether `tokens` at `positions`, [B, n] int64 each, end their requests."""
        # Before `min_tokens` the scheduler goes on, whatever the token.
        stops = self.stops[slot[:, None], tokens] & (positions >= options.first_stop[:, None])
        return stops | (positions == options.last_position[:, None])


def width_at(options: Options, start: Tensor, facts: Facts) -> Tensor:
    """Columns of canvases at positions `start` [B, ...]; less than 1 where there is no room.

    Diffusion decides a block as a whole, so it is cut only by the model's length.
    """
    each = (-1, *[1] * (start.dim() - 1))
    width = torch.minimum(options.block_length.view(each), facts.max_model_len - start)
    if not facts.verifies:
        return width
    wanted = options.last_position.view(each) - start + 1
    return torch.where(options.verifies.view(each), torch.minimum(width, wanted), width)
