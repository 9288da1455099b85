# SPDX-License-Identifier: Apache-2.0
"""Grammars of structured output: what may follow the text, and what of a canvas may stay.

A request's matcher is where its final text ends. In every forward it walks on along the canvas, as
far as its columns are filled: rows that follow a text, and the first masked column, are drawn under
the exact mask. What a step fills further right is provisional: it is walked once everything before
it is filled, and what is refused is masked again or, in the last step that a canvas has, drawn
again under its mask.

Matchers live on the host, so a batch that holds a grammar reads its canvases back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_nbdiff.compat import GrammarCompiler, thoughts_of
from vllm_nbdiff.decoding.decide import Proposal
from vllm_nbdiff.decoding.emitted import Emitted
from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.rows import Packed
from vllm_nbdiff.engine.canvas_walk import DrawAgain, Opened, walk_canvas
from vllm_nbdiff.engine.counts import Tally
from vllm_nbdiff.engine.matcher import Failure, Matcher, NothingFits, apply_bits
from vllm_nbdiff.engine.schedule import Schedule
from vllm_nbdiff.names import LOGGER

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

logger = init_logger(LOGGER)


class GrammarTable:
    """Grammars of all requests, by slot."""

    def __init__(
        self, vllm_config: VllmConfig, num_slots: int, text: Tensor, mask_token_id: int
    ) -> None:
        """
        Args:
            num_slots: largest number of requests.
            text: [slots, T] int32 on the model's device, tokens of every request.
            mask_token_id: of the model.
        """
        self._vllm_config = vllm_config
        self._compiler = GrammarCompiler(vllm_config)
        self._text = text
        self._mask = mask_token_id
        self._used = np.zeros(num_slots + 1, np.bool_)
        self._matchers: dict[int, Matcher] = {}
        self._failed: dict[int, Failure] = {}
        self._opened: dict[int, Opened] = {}

    def add_request(self, slot: int, params: SamplingParams, prompt: list[int]) -> None:
        """Set the grammar of a request, if it has one."""
        self.remove_request(slot)
        if params.structured_outputs is None:
            return
        self._used[slot] = True
        with self._guarded(slot):
            compiled = self._compiler.compile(params)
            stops = set(params.all_stop_token_ids)
            thoughts = thoughts_of(self._vllm_config, params, prompt)
            self._matchers[slot] = Matcher(compiled, len(prompt), stops, thoughts)

    def remove_request(self, slot: int) -> None:
        """Forget a finished or preempted request."""
        self._used[slot] = False
        self._failed.pop(slot, None)
        self._matchers.pop(slot, None)

    def end_requests(
        self, schedule: Schedule, tally: Tally, emitted: Emitted, before: Tensor
    ) -> None:
        """End the requests that cannot go on.

        Args:
            tally: that counts them.
            emitted: what the schedule's forwards emitted, to which a text that is refused does not
                belong.
            before: [B] int64, tokens that those before this one emitted.
        """
        if not self._failed:
            return
        found = [self._failed.get(slot) for slot in schedule.slots.tolist()]
        flags = np.array([[own is kind for own in found] for kind in Failure])
        broken, refused, lost = async_tensor_h2d(flags, device=self._text.device).unbind()
        tally.add_broken(broken.long())
        tally.add_stuck((refused | lost).long())
        emitted.end(refused | lost, torch.where(refused, before, emitted.count))

    def mask(
        self, logits: Tensor, plan: Plan, packed: Packed, owner: np.ndarray, schedule: Schedule
    ) -> None:
        """Ban what grammars refuse, in rows [n, V] float32 of constrained requests, in place.

        Args:
            packed: these rows.
            owner: [n] int64, batch index of each row on the host, ascending.
        """
        if not self._used[schedule.slots].any():
            return
        rows = self._rows(plan, packed, owner, schedule)
        if not rows:
            return
        chosen: list[int] = []
        bits = np.full((len(logits), -(-logits.shape[1] // 32)), -1, np.int32)
        seen = self._read(plan, schedule)
        for request, own in rows.items():
            slot = int(schedule.slots[request])
            with self._guarded(slot):
                line = seen[request].tolist()
                for row, allowed in self._masks(slot, request, line, own, plan.num_next):
                    chosen.append(row)
                    bits[row] = allowed[0, : bits.shape[1]]
        word, bit = divmod(self._mask, 32)
        for one in self._opened.values():
            if not one.thinks:  # the column has to be filled
                bits.view(np.uint32)[one.rows[one.column], word] &= np.uint32(~(1 << bit) % 2**32)
        if chosen:
            apply_bits(logits, torch.from_numpy(bits), chosen)

    def empty(self, needed: Tensor, chance: Tensor, schedule: Schedule) -> Tensor | None:
        """[B, N] bool: rows of texts that are `needed` [B, N] bool, and whose draws have the
        probability `chance` [B, N], in which a grammar left no token: what is drawn there stands
        for none. None: there is no grammar."""
        used = self._used[schedule.slots]
        if not used.any():
            return None
        own = async_tensor_h2d(used, device=chance.device)[:, None]
        return own & needed & (chance <= 0)

    def lose(self, reads: Tensor, length: Tensor, empty: Tensor, schedule: Schedule) -> Tensor:
        """[B] bool: of requests that `reads` [B] bool texts, or their prompts' ends, those that
        cannot go on, as the row behind the `length` [B] columns that are final is `empty` [B, N]
        bool."""
        behind = (length - 1).clamp(min=0, max=empty.shape[1] - 1)
        lost = reads & empty.gather(1, behind[:, None])[:, 0]
        slots = schedule.slots[lost.cpu().numpy()]
        self._failed |= dict.fromkeys(slots.tolist(), Failure.LOST)
        return lost

    def _rows(
        self, plan: Plan, packed: Packed, owner: np.ndarray, schedule: Schedule
    ) -> dict[int, dict[int, int]]:
        """By request with a grammar that can go on, its rows by their place."""
        wanted = self._used[schedule.slots]
        if self._failed:
            wanted &= ~np.isin(schedule.slots, list(self._failed))
        padding = plan.rows.needed.shape[1]
        places = packed.place.cpu().numpy()
        chosen = np.flatnonzero(wanted[owner] & (places < padding))
        rows: dict[int, dict[int, int]] = {}
        for request, place, row in zip(
            owner[chosen].tolist(), places[chosen].tolist(), chosen.tolist(), strict=True
        ):
            rows.setdefault(request, {})[place] = row
        return rows

    def walk(
        self,
        plan: Plan,
        proposal: Proposal,
        accepted: Tensor,
        draw_again: DrawAgain,
    ) -> tuple[Proposal, Tensor, Tensor | None]:
        """What of a proposal stays, of canvases [B, L] and of the `accepted` [B, L] bool columns;
        and, of requests that cannot go on, the columns [B] int64 that are legal, -1 of the others;
        None: all can.

        The first masked column is always taken, but for thoughts and drafts.
        """
        opened, self._opened = self._opened, {}
        if not opened:
            return proposal, accepted, None
        is_last = (plan.step + 1 >= plan.options.max_steps)[:, None].expand_as(accepted)
        flags = accepted, is_last, proposal.probability > 0
        fields = proposal.canvas, proposal.token, *(flag.long() for flag in flags)
        seen = torch.stack(fields, dim=1).cpu().numpy()
        legal = np.full(len(seen), -1)
        for request, one in opened.items():
            with self._guarded(one.slot):
                if not walk_canvas(one, seen[request], self._mask, draw_again):
                    self._failed[one.slot] = Failure.LOST
                    legal[request] = one.column
        requests = list(opened)
        index, own, columns = (
            async_tensor_h2d(part, device=accepted.device)
            for part in (np.array(requests), seen[requests, :3], legal)
        )
        canvas, token, taken = own.unbind(1)
        proposal = proposal._replace(
            canvas=proposal.canvas.index_copy(0, index, canvas),
            token=proposal.token.index_copy(0, index, token),
        )
        accepted = accepted.index_copy(0, index, taken.bool())
        return proposal, accepted, columns if (legal >= 0).any() else None

    def _read(self, plan: Plan, schedule: Schedule) -> np.ndarray:
        """[B, 4 + L] int64: where each request's final text ends, columns of a text that is read,
        whether such texts are drafts, columns and tokens of its canvas."""
        decodes, prompt = schedule.decodes, schedule.batch.computed + schedule.batch.scheduled
        state, verifies = plan.state, plan.options.verifies.long()
        numbers = torch.stack([state.start, prompt, plan.text, verifies, state.width], dim=1)
        seen = torch.cat([numbers, state.tokens], dim=1).cpu().numpy()
        # A prompt ends where nothing of a canvas is read.
        seen[:, 1] = np.where(decodes, seen[:, 0], seen[:, 1])
        seen[:, 4] *= decodes
        return seen[:, 1:]

    def _masks(
        self, slot: int, request: int, seen: list[int], rows: dict[int, int], num_next: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Rows of logits of a request, and the bits of what each may give."""
        matcher = self._matchers[slot]
        end, text, drafts, width, *tokens = seen
        behind = self._text[slot, matcher.position : end].tolist() if end > matcher.position else []
        matcher.follow(behind)
        if not width:  # a prompt ends
            if matcher.constrains:
                yield rows[0], matcher.allowed()
            return
        first = max(matcher.prompt_length - end, 0)  # the tail of a prompt may lie in the canvas
        for column in range(first, text or width):
            if not text and tokens[column] == self._mask:
                own = {place - num_next: row for place, row in rows.items()}
                if not matcher.has_ended:
                    self._opened[request] = Opened(
                        slot, matcher, column, own, matcher.thinks, bool(drafts)
                    )
                if matcher.constrains:
                    yield own[column], matcher.allowed()
                return
            if not matcher.accepts(tokens[column]):
                if column == first or not (text or drafts):
                    raise NothingFits
                return  # verification will not keep this draft
            place = column if num_next > 1 else column + 1 - text
            if text and place in rows and matcher.constrains:
                yield rows[place], matcher.allowed()

    @contextlib.contextmanager
    def _guarded(self, slot: int) -> Iterator[None]:
        """End the request in `slot`, and no other one, with whatever goes wrong."""
        try:
            yield
        except NothingFits:
            self._failed[slot] = Failure.REFUSED
        except Exception:
            logger.exception("A grammar failed")
            self._failed[slot] = Failure.BROKEN
