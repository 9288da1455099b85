# SPDX-License-Identifier: Apache-2.0
"""Applies what a forward decided: fills canvases, commits and verifies text, begins canvases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vllm_nbdiff.decoding import rules
from vllm_nbdiff.decoding.rules import RULES
from vllm_nbdiff.engine import drafts
from vllm_nbdiff.engine.canvas import NO_TOKEN, CanvasState
from vllm_nbdiff.engine.plan import FILL, GUESS, NEXT, Batch, Plan
from vllm_nbdiff.engine.sampler import Drawn, RowSampler


@dataclass
class Emitted:
    """What the forwards of one schedule gave the B requests."""

    tokens: np.ndarray  # [B, L] int64
    count: np.ndarray  # [B] int64, tokens emitted
    ended: np.ndarray  # [B] bool, the last one ends the request
    forwards: np.ndarray  # [B] int64
    rows: np.ndarray  # [B] int64, canvas and text rows computed
    guesses: np.ndarray  # [B] int64, seeds guessed and put to the test
    hits: np.ndarray  # [B] int64, of them right
    singles: np.ndarray  # [B] int64, forwards of one row: autoregressive steps

    @classmethod
    def nothing(cls, num_reqs: int, length: int) -> Emitted:
        """Before the first forward."""
        tokens = np.zeros((num_reqs, length), np.int64)
        zeros = np.zeros((6, num_reqs), np.int64)
        return cls(tokens, zeros[0], np.zeros(num_reqs, np.bool_), *zeros[1:])

    def append(self, index: int, tokens: np.ndarray) -> None:
        """Emit `tokens` [n] of the request with this batch index."""
        begin = self.count[index]
        self.count[index] = begin + len(tokens)
        self.tokens[index, begin : begin + len(tokens)] = tokens


class Decoder:
    """One forward's decisions for a batch."""

    def __init__(self, state: CanvasState, sampler: RowSampler, ends_early: bool) -> None:
        """
        Args:
            state: of all requests.
            sampler: of the needed rows.
            ends_early: emit the tokens that end a request before their KV is final.

        `observe_draft(width, accepted)` is called for verified canvases of mode `auto`.
        """
        self.state = state
        self.sampler = sampler
        self.ends_early = ends_early
        self.observe_draft: Callable[[int, int], None] | None = None

    def step(self, logits: torch.Tensor, batch: Batch, plan: Plan, emitted: Emitted) -> None:
        """Take the logits [n, V] of the plan's rows; changes the state and `emitted`."""
        emitted.forwards += ~batch.prefilling
        owner, length = plan.segments.owner, plan.segments.length
        rows = np.bincount(owner, length, len(batch.slots)).astype(np.int64)
        emitted.rows += rows
        emitted.singles += (rows == 1) & ~batch.prefilling
        if not len(plan.rows.owner):
            return
        drawn = self.sampler.draw(logits, batch, plan)
        if plan.drafts is not None:
            drafts.keep_right_ones(batch, plan, drawn)
        looked = plan.look & ~plan.ahead
        if plan.text.any() or batch.prefill_ends.any():
            looked |= self._take_text(batch, plan, drawn, emitted)
        if looked.any():
            self._fill(logits, batch, plan, drawn, looked, emitted)

    def _take_text(self, batch: Batch, plan: Plan, drawn: Drawn, emitted: Emitted) -> np.ndarray:
        """Commit or verify canvases and begin the next ones.

        Returns:
            [B] bool, requests whose next canvas, already looked at, began with the seed guessed.
        """
        state, rows = self.state, plan.rows
        # What follows each canvas column: its own next token unless a row says otherwise.
        tokens = state.tokens[batch.slots]
        following = np.roll(tokens, -1, axis=1)
        chosen = np.flatnonzero((rows.kind == NEXT) & ~batch.prefilling[rows.owner])
        following[rows.owner[chosen], rows.column[chosen]] = drawn.token[chosen]
        columns = np.arange(tokens.shape[1] - 1)
        wrong = (following[:, :-1] != tokens[:, 1:]) & (columns < plan.text[:, None] - 1)
        length = plan.text
        if len(columns):
            length = np.where(wrong.any(1), wrong.argmax(1) + 1, length)
        texts = np.flatnonzero(plan.text)
        seeds = np.zeros_like(plan.text)
        seeds[texts] = following[texts, length[texts] - 1]
        start = np.where(batch.prefilling, batch.computed + batch.scheduled, 0)
        start[texts] = state.start[batch.slots[texts]] + length[texts]
        first = np.flatnonzero((rows.kind == NEXT) & batch.prefilling[rows.owner])
        seeds[rows.owner[first]] = drawn.token[first]

        for index in texts:
            wanted = self._emit(index, tokens[index, : length[index]], batch, emitted)
            if self.observe_draft is not None and state.auto[batch.slots[index]]:
                self.observe_draft(int(plan.text[index]), wanted)
            if not emitted.ended[index] and emitted.count[index] < batch.scheduled[index]:
                self._end_at_seed(index, seeds[index], start[index], batch, emitted)
        kept = plan.ahead & (length == plan.text) & (seeds == state.guess[batch.slots])
        emitted.guesses += plan.ahead
        emitted.hits += kept
        begun = np.flatnonzero((plan.text > 0) | batch.prefill_ends)
        state.begin(batch.slots[begun], start[begun], seeds[begun])
        return kept

    def _emit(self, index: int, tokens: np.ndarray, batch: Batch, emitted: Emitted) -> int:
        """Emit committed text from the start of the canvas.

        Returns:
            Tokens up to the one that ends the request, or all.
        """
        slot = batch.slots[index : index + 1]
        positions = self.state.start[slot] + np.arange(len(tokens))
        emitted.append(index, tokens)
        last = self.state.is_last(slot, tokens[None], positions[None])[0]
        emitted.ended[index] |= last.any()
        return int(last.argmax()) + 1 if last.any() else len(tokens)

    def _end_at_seed(
        self, index: int, seed: int, position: int, batch: Batch, emitted: Emitted
    ) -> None:
        """Emit a seed that ends the request: nothing comes after it that would need its KV."""
        slot = batch.slots[index : index + 1]
        token, at = np.array([seed]), np.array([position])
        if self.ends_early and self.state.is_last(slot, token, at)[0]:
            emitted.append(index, token)
            emitted.ended[index] = True

    def _fill(
        self,
        logits: torch.Tensor,
        batch: Batch,
        plan: Plan,
        drawn: Drawn,
        looked: np.ndarray,
        emitted: Emitted,
    ) -> None:
        """Fill canvas positions of the requests `looked` [B] bool."""
        state, rows, mask = self.state, plan.rows, self.state.config.mask_token_id
        fills = np.flatnonzero((rows.kind == FILL) & looked[rows.owner])
        where = rows.owner[fills], rows.column[fills]
        proposed = np.full(plan.canvas.shape, mask)
        likely, rank = np.zeros((2, *plan.canvas.shape), np.float32)
        proposed[where] = drawn.token[fills]
        likely[where] = drawn.probability[fills]
        rank[where] = drawn.confidence[fills]

        active = plan.active & looked[:, None]
        accepted = self._select(batch, plan, active, rank, likely)
        if state.constraints:
            self.sampler.undo_bad_words(batch, plan, proposed, rank, accepted)
        accepted &= proposed != mask
        stuck = looked & ~accepted.any(1)
        if stuck.any():
            owner, column, token = self.sampler.fill_likeliest(logits, plan, stuck)
            accepted[owner, column] = True
            proposed[owner, column] = token

        done = np.flatnonzero(looked)
        slots = batch.slots[done]
        canvas = np.where(accepted, proposed, plan.canvas)
        state.tokens[slots] = canvas[done]
        state.step[slots] += 1
        if state.num_drafts[slots].any():
            left = active & ~accepted & (proposed != mask)
            state.proposed[slots] = np.where(left, proposed, NO_TOKEN)[done]
            state.rank[slots] = rank[done]
        size = state.sub_block_length[slots]
        state.cached[slots] = active[done].argmax(1) // size * size
        state.guess[slots] = NO_TOKEN
        guesses = np.flatnonzero((rows.kind == GUESS) & looked[rows.owner])
        state.guess[batch.slots[rows.owner[guesses]]] = drawn.token[guesses]
        if self.ends_early:
            self._end_early(batch, plan, canvas, looked, emitted)

    def _select(
        self,
        batch: Batch,
        plan: Plan,
        active: np.ndarray,
        rank: np.ndarray,
        likely: np.ndarray,
    ) -> np.ndarray:
        """Positions [B, L] bool that every request's own rule takes."""
        names = [self.state.rule[slot] for slot in batch.slots]
        threshold = self.state.threshold[batch.slots]
        accepted = np.zeros_like(active)
        for name in set(names):
            own = np.flatnonzero([name == other for other in names])
            accepted[own] = rules.select(
                RULES[name], active[own], rank[own], likely[own], threshold[own], plan.quota[own]
            )
        return accepted

    def _end_early(
        self,
        batch: Batch,
        plan: Plan,
        canvas: np.ndarray,
        looked: np.ndarray,
        emitted: Emitted,
    ) -> None:
        """End requests at a stop token, or the last wanted position, with no mask before it.

        Filled positions never change, so no commit is needed. Drafts may change.
        """
        state, columns = self.state, np.arange(canvas.shape[1])
        room = np.minimum(plan.width, batch.scheduled - emitted.count)
        room[~looked | state.verifies[batch.slots]] = 0
        positions = state.start[batch.slots][:, None] + columns
        ends = state.is_last(batch.slots, canvas, positions) & (columns < room[:, None])
        ends &= (canvas == state.config.mask_token_id).cumsum(1) == 0
        for index in np.flatnonzero(ends.any(1)):
            emitted.append(index, canvas[index, : ends[index].argmax() + 1])
            emitted.ended[index] = True
