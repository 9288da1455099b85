# SPDX-License-Identifier: Apache-2.0
"""One token, its probability and its confidence for every needed row of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.worker.gpu.states import RequestState

from vllm_nbdiff.decoding.sampling import RowParams, sample, sample_greedy
from vllm_nbdiff.engine.canvas import CanvasState
from vllm_nbdiff.engine.constraints import bad_word_spans
from vllm_nbdiff.engine.plan import FILL, Batch, Plan
from vllm_nbdiff.kernels.uniform import uniform


@dataclass
class Drawn:
    """What was drawn for the n rows of a plan, on the host."""

    token: np.ndarray  # [n] int64
    probability: np.ndarray  # [n] float32
    confidence: np.ndarray  # [n] float32, what positions are ranked by


class RowSampler:
    """Draws tokens with every request's sampling parameters."""

    def __init__(self, state: CanvasState, req_states: RequestState) -> None:
        self.state = state
        self.req_states = req_states

    def draw(self, logits: torch.Tensor, batch: Batch, plan: Plan) -> Drawn:
        """Draw from `logits` [n, V], which it may change, for the rows of `plan`."""
        rows = plan.rows
        mask = self.state.config.mask_token_id
        # Text never holds the mask; a canvas position may keep it.
        text = np.flatnonzero(rows.kind != FILL)
        if len(text):
            logits[_on(text, logits), mask] = -torch.inf
        if not self.state.needs_distribution[batch.slots].any():
            token, probability = sample_greedy(logits)
            chance = _host(probability)
            return Drawn(_host(token), chance, chance)
        if self.state.constraints:
            logits = self._constrain(logits, batch, plan)
        params = self._row_params(batch, plan, logits.device)
        token, probability, confidence = sample(logits, params, mask)
        return Drawn(_host(token), _host(probability), _host(confidence))

    def _row_params(self, batch: Batch, plan: Plan, device: torch.device) -> RowParams:
        state, rows = self.state, plan.rows
        slots = batch.slots[rows.owner]

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return RowParams(
            temperature=tensor(state.temperature[slots]),
            top_p=tensor(state.top_p[slots]),
            top_k=tensor(state.top_k[slots]),
            min_p=tensor(state.min_p[slots]),
            algorithm=tensor(state.score[slots]),
            # A position's token depends on nothing but seed, position and step.
            draw=uniform(tensor(state.seed[slots]), tensor(rows.position), tensor(rows.step)),
        )

    def fill_likeliest(
        self, logits: torch.Tensor, plan: Plan, stuck: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The likeliest position of each `stuck` request [B] bool, with its best other token.

        The greedy tokens of all its rows were the mask; the reference would repeat that step
        forever.

        Returns:
            batch index, column, token of one position a request, [k] int64 each.
        """
        rows = np.flatnonzero(stuck[plan.rows.owner] & (plan.rows.kind == FILL))
        chosen = logits[_on(rows, logits)].float()
        chosen[:, self.state.config.mask_token_id] = -torch.inf
        token, probability = (_host(x) for x in sample_greedy(chosen))
        owner = plan.rows.owner[rows]
        best = [
            max(np.flatnonzero(owner == b), key=lambda i: probability[i])
            for b in np.flatnonzero(stuck)
        ]
        return owner[best], plan.rows.column[rows][best], token[best]

    def _constrain(self, logits: torch.Tensor, batch: Batch, plan: Plan) -> torch.Tensor:
        """Logits with each constrained request's rows changed by its sampling parameters."""
        constrained = [
            (b, self.state.constraints[slot])
            for b, slot in enumerate(batch.slots.tolist())
            if slot in self.state.constraints
        ]
        if not constrained:
            return logits
        logits = logits.float()
        for b, constraints in constrained:
            prompt_len = int(self.req_states.prompt_len.np[batch.slots[b]])
            own = plan.rows.owner == b
            # A canvas position sees the filled ones; a next token what stands before it.
            fills = np.flatnonzero(own & (plan.rows.kind == FILL))
            drafts = plan.rows.draft[fills]
            nexts = np.flatnonzero(own & (plan.rows.kind != FILL))
            for group in [*(fills[drafts == d] for d in np.unique(drafts)), *nexts[:, None]]:
                position = plan.rows.position[group]
                tokens, known = self.history(batch, plan, b, int(plan.rows.draft[group[0]]))
                if plan.rows.kind[group[0]] != FILL:
                    end = int(position[0])
                    tokens, known = tokens[: end + 1], known[: end + 1]
                    known[end:] = False
                index = _on(group, logits)
                block = logits[index].cpu()
                constraints.apply(block, position.tolist(), tokens, known, prompt_len)
                logits[index] = block.to(logits.device)
        return logits

    def history(
        self, batch: Batch, plan: Plan, index: int, draft: int = -1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A request's tokens with one column to spare, and which of them are known.

        The canvas is that of the plan's `draft` if that is not negative. Only for requests without
        tokens that the runner has not been told of.
        """
        slot = batch.slots[index]
        prefilling = batch.prefilling[index]
        start = int(batch.computed[index] + batch.scheduled[index])
        block = self.state.tokens[slot, :0]
        if not prefilling:
            start = int(self.state.start[slot])
            canvas = self.state.tokens[slot]
            if draft >= 0:
                assert plan.drafts is not None
                canvas = plan.drafts.canvas[draft]
            block = canvas[: self.state.width[slot]]
        text = self.req_states.all_token_ids.gpu[slot, :start].cpu().long()
        mask = self.state.config.mask_token_id
        tokens = torch.cat([text, torch.from_numpy(block), torch.tensor([mask])])
        known = torch.ones_like(tokens, dtype=torch.bool)
        known[start:] = tokens[start:] != mask
        return tokens, known

    def undo_bad_words(
        self,
        batch: Batch,
        plan: Plan,
        proposed: np.ndarray,
        rank: np.ndarray,
        accepted: np.ndarray,
    ) -> None:
        """Take back positions accepted together that form a bad word, least confident first.

        One position alone cannot complete a bad word (`Constraints.apply`), so one is always kept.

        Args:
            batch: scheduled requests.
            plan: of the forward.
            proposed: [B, L] int64, token of every active column.
            rank: [B, L] float, confidence of every active column.
            accepted: [B, L] bool, changed in place.
        """
        mask = self.state.config.mask_token_id
        for b, slot in enumerate(batch.slots.tolist()):
            constraints = self.state.constraints.get(slot)
            if constraints is None or not constraints.bad_words or not plan.look[b]:
                continue
            text, known = self.history(batch, plan, b)
            start, width = int(self.state.start[slot]), int(plan.width[b])
            while True:
                new = accepted[b, :width]
                block = np.where(new, proposed[b, :width], plan.canvas[b, :width])
                text[start : start + width] = torch.from_numpy(block)
                known[start : start + width] = torch.from_numpy(block != mask)
                spans = bad_word_spans(constraints.bad_words, start, text, known)
                fresh = [i - start for span in spans for i in span if i >= start and new[i - start]]
                if not fresh:
                    break
                accepted[b, min(fresh, key=lambda column: rank[b, column])] = False


def _host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _on(index: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(index).to(tensor.device)
