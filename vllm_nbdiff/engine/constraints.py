# SPDX-License-Identifier: Apache-2.0
"""Constraints of all requests, by slot, and the rows of a forward that they change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_nbdiff.compat import begins_by_thinking
from vllm_nbdiff.decoding.bad_words import BadWords, group_words
from vllm_nbdiff.decoding.canvas import Canvas
from vllm_nbdiff.decoding.constraints import (
    Constraints,
    Context,
    Penalties,
    Thinking,
    penalize,
)
from vllm_nbdiff.decoding.decide import Proposal
from vllm_nbdiff.decoding.needed import predicted
from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.rows import Packed
from vllm_nbdiff.engine.schedule import Schedule

_CHUNK = 1 << 24  # numbers: what penalties keep aside does not grow with the batch


class ConstraintTable:
    """What requests ask for, and the tokens that they have."""

    def __init__(
        self, num_slots: int, vocab_size: int, text: Tensor, end_think_token_id: int | None = None
    ) -> None:
        """
        Args:
            num_slots: largest number of requests.
            vocab_size: of the model.
            text: [slots, T] int32 on the model's device, tokens of every request.
            end_think_token_id: what ends thinking, where requests may have a budget for it.
        """
        self.end_think_token_id = end_think_token_id
        self.text = text
        self.vocab_size = vocab_size
        self.constrained = np.zeros(num_slots + 1, np.bool_)
        """[slots + 1] bool, requests with any constraint."""
        self._by_slot: dict[int, Constraints] = {}

    def add_request(self, slot: int, params: SamplingParams, prompt_length: int) -> bool:
        """Set the constraints of a request; whether it has any, a grammar included."""
        constraints = self._from_params(params, prompt_length)
        constrained = constraints.any or params.structured_outputs is not None
        self.constrained[slot] = constrained
        if constrained:
            self._by_slot[slot] = constraints
        return constrained

    def remove_request(self, slot: int) -> None:
        """Forget a finished or preempted request."""
        self.constrained[slot] = False
        self._by_slot.pop(slot, None)

    def _from_params(self, params: SamplingParams, prompt_length: int) -> Constraints:
        bias, stop = params.logit_bias, params.all_stop_token_ids
        allowed = None
        if params.allowed_token_ids:
            allowed = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.text.device)
            allowed.index_fill_(0, self._on_device(params.allowed_token_ids), True)
        words = group_words(params.bad_words_token_ids or ())
        return Constraints(
            prompt_length=prompt_length,
            allowed=allowed,
            bias=(
                self._on_device(int(token) for token in bias),
                self._on_device(bias.values(), torch.float32),
            )
            if bias
            else None,
            min_tokens=params.min_tokens,
            stop_ids=self._on_device(sorted(stop)) if params.min_tokens and stop else None,
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            bad_words=[BadWords(self._on_device(group)) for group in words],
            thinking=self._thinking(params),
        )

    def _on_device(self, numbers: Iterable[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers of the host, which does not wait for the copy."""
        return async_tensor_h2d(list(numbers), dtype=dtype, device=self.text.device)

    def _thinking(self, params: SamplingParams) -> Thinking | None:
        budget, has_grammar = params.thinking_token_budget, params.structured_outputs is not None
        # Where a grammar holds from the start nothing is thought.
        if budget is None or (has_grammar and not begins_by_thinking(params)):
            return None
        assert self.end_think_token_id is not None
        return Thinking(budget, self.end_think_token_id, looks_at_seed=has_grammar)

    def apply(
        self, logits: Tensor, plan: Plan, packed: Packed, owner: np.ndarray, schedule: Schedule
    ) -> None:
        """Constrain rows [n, V] float32 of requests that all have constraints, in place.

        Args:
            packed: these rows.
            owner: [n] int64, batch index of each row on the host, ascending.
        """
        slots, mask = schedule.slots, schedule.facts.mask_token_id
        if not any(self._by_slot[slot].any for slot in slots[self.constrained[slots]].tolist()):
            return  # grammars alone
        parts = list(self._parts(owner, slots))
        context = context_of(plan, packed, schedule)
        for constraints, rows in parts:
            constraints.before_penalties(logits[rows], context.rows(rows))
        longest = schedule.longest
        if any(constraints.penalized for constraints, _ in parts):
            size = max(_CHUNK // max(logits.shape[1], longest), 1)
            for rows in (slice(i, i + size) for i in range(0, len(logits), size)):
                text = self.text[context.slot[rows], :longest].long()
                penalties = self._penalties(slots[owner[rows]])
                penalize(logits[rows], penalties, context.rows(rows), text, mask)
        for constraints, rows in parts:
            if constraints.reads_text:
                text = self.text[context.slot[rows], :longest].long()
                constraints.after_penalties(logits[rows], context.rows(rows), text)

    def _parts(self, owner: np.ndarray, slots: np.ndarray) -> Iterator[tuple[Constraints, slice]]:
        """The constraints of each request, and its rows."""
        requests, begin = np.unique(owner, return_index=True)
        ends = [*begin[1:].tolist(), len(owner)]
        for request, first, end in zip(requests.tolist(), begin.tolist(), ends, strict=True):
            yield self._by_slot[int(slots[request])], slice(first, end)

    def _penalties(self, slots: np.ndarray) -> Penalties:
        own = [self._by_slot[slot] for slot in slots.tolist()]
        values = [[c.repetition, c.frequency, c.presence, c.prompt_length] for c in own]
        columns = async_tensor_h2d(np.array(values, np.float64), device=self.text.device)
        repetition, frequency, presence, prompt_length = columns.unsqueeze(2).unbind(1)
        return Penalties(
            repetition.float(), frequency.float(), presence.float(), prompt_length.long()
        )

    def keep_text(self, plan: Plan, length: Tensor, schedule: Schedule) -> None:
        """Write what is final, the first `length` [B] of each canvas, into the requests' tokens."""
        chosen = np.flatnonzero(self.constrained[schedule.slots])
        if not len(chosen):
            return
        own = async_tensor_h2d(chosen, device=length.device)
        start, tokens = plan.state.start[own, None], plan.state.tokens[own]
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        final = columns < length[own, None]
        # What is not final rewrites the token before it.
        place = torch.where(final, start + columns, (start - 1).clamp(min=0))
        slot = schedule.batch.slot[own, None]
        old = self.text[slot, place]
        self.text[slot, place] = torch.where(final, tokens.to(old.dtype), old)

    def undo_bad_words(
        self, accepted: Tensor, plan: Plan, proposal: Proposal, schedule: Schedule
    ) -> Tensor:
        """`accepted` [B, L] bool without columns that together form a bad word.

        Where filled positions are edited, what is not accepted leaves a token that may complete
        another word, so it is looked at until nothing changes: after so many times as columns.
        """
        facts = schedule.facts
        own = (self._by_slot.get(slot) for slot in schedule.slots.tolist())
        if not any(constraints is not None and constraints.bad_words for constraints in own):
            return accepted
        for _ in range(accepted.shape[1] if facts.edits else 1):
            before = accepted.clone()
            accepted = self._undo_once(accepted, plan, proposal, schedule)
            if not facts.static and torch.equal(before, accepted):
                break
        return accepted

    def _undo_once(
        self, accepted: Tensor, plan: Plan, proposal: Proposal, schedule: Schedule
    ) -> Tensor:
        for request, slot in enumerate(schedule.slots.tolist()):
            constraints = self._by_slot.get(slot)
            if constraints is None:
                continue
            for words in constraints.bad_words:
                canvas, taken = proposal.canvas[request], accepted[request]
                known = canvas != schedule.facts.mask_token_id
                known &= (
                    torch.arange(len(known), device=known.device) < plan.canvases.width[request, 0]
                )
                accepted[request] = words.undo(
                    taken,
                    known,
                    torch.where(taken, proposal.token[request], canvas),
                    proposal.confidence[request],
                    plan.state.start[request],
                    self.text[slot, : schedule.longest].long(),
                )
        return accepted

    def end_thinking(self, canvas: Canvas, begun: Tensor, schedule: Schedule) -> Canvas:
        """`canvas` with the end of thinking where a budget is spent inside a block that has
        `begun` [B] bool, unless an earlier block holds it. Where the block itself is behind that,
        its seed is forced to be the end."""
        tokens = canvas.tokens
        for request, slot in enumerate(schedule.slots.tolist()):
            own = self._by_slot.get(slot)
            if own is None or own.thinking is None:
                continue
            one, start = slice(request, request + 1), canvas.start[request : request + 1]
            text = self.text[slot : slot + 1, : schedule.longest].long()
            place = start - own.prompt_length + torch.arange(tokens.shape[1], device=start.device)
            ends = (place == own.thinking.budget) & begun[one] & ~own.has_thought(text, start)
            if own.thinking.looks_at_seed:
                ends = ends & (tokens[one, 0] != own.thinking.end_token_id)
            tokens[one] = torch.where(ends, own.thinking.end_token_id, tokens[one])
        return canvas


def context_of(plan: Plan, packed: Packed, schedule: Schedule) -> Context:
    """What the rows that are `packed` see: a canvas position the filled ones of its canvas, a next
    token what stands before it."""
    batch, owner = schedule.batch, packed.owner
    row, length = predicted(plan, batch, owner, packed.place), plan.canvases.tokens.shape[2]
    position, is_fill = row.position, row.canvas >= 0
    place = owner, row.canvas.clamp(min=0)
    canvas = torch.where(is_fill[:, None], plan.canvases.tokens[place], plan.state.tokens[owner])
    text_end = torch.where(batch.decodes[owner], plan.state.start[owner], position)
    seen = torch.where(is_fill, plan.canvases.width[place], position - text_end)
    columns = torch.arange(length, device=canvas.device)
    known = (canvas != schedule.facts.mask_token_id) & (columns < seen[:, None])
    if schedule.facts.edits:
        # What stands at the position itself is what may be replaced.
        known &= ~is_fill[:, None] | (columns != (position - plan.canvases.start[place])[:, None])
    return Context(batch.slot[owner], text_end, canvas, known, position, row.canvas < 0)
