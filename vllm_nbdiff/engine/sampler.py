# SPDX-License-Identifier: Apache-2.0
"""One token, its probability and its confidence for every needed row of logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_nbdiff.decoding.decide import Proposal
from vllm_nbdiff.decoding.draws import draw_rows
from vllm_nbdiff.decoding.logprobs import process
from vllm_nbdiff.decoding.needed import predicted
from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.rows import Packed
from vllm_nbdiff.decoding.sampling import Drawn, RowParams, is_sound
from vllm_nbdiff.engine.constraints import ConstraintTable
from vllm_nbdiff.engine.grammars import GrammarTable
from vllm_nbdiff.engine.logprobs import LogprobTable
from vllm_nbdiff.engine.matcher import apply_bits
from vllm_nbdiff.engine.schedule import Schedule
from vllm_nbdiff.kernels.uniform import uniform


class RowSampler:
    """Draws tokens with every request's sampling parameters."""

    def __init__(
        self,
        constraints: ConstraintTable,
        grammars: GrammarTable,
        logprobs: LogprobTable,
        mask_token_id: int,
    ) -> None:
        self.constraints = constraints
        self.grammars = grammars
        self.logprobs = logprobs
        self.mask_token_id = mask_token_id
        self._groups: list[tuple[Tensor | None, Tensor]] = []
        self._params: RowParams | None = None
        self._broken: tuple[Tensor, Tensor] | None = None
        """Constrained rows of the last draw, and which of them the model gave broken."""

    def draw(self, logits: Tensor, plan: Plan, packed: Packed, schedule: Schedule) -> Drawn:
        """Draw from `logits` [n, V], which it may change, for the rows that are `packed`."""
        texts = self._texts(plan, packed)
        if self.logprobs.asked:
            self._logits, self._mask_logits = logits, logits[:, self.mask_token_id].clone()
        self._groups = self._constrained(logits, plan, packed, schedule)
        self._params = params = self._row_params(plan, packed, schedule)
        parts = []
        for rows, part in self._groups:
            if texts is not None:
                own = texts if rows is None else texts[rows]
                # Text never holds the mask; a canvas position may keep it.
                part[:, self.mask_token_id].masked_fill_(own, -torch.inf)
            needed = packed.valid if rows is None or packed.valid is None else packed.valid[rows]
            own_params = params if rows is None or params is None else params[rows]
            drawn = draw_rows(part, own_params, self.mask_token_id, needed, schedule.asked.chances)
            parts.append(drawn)
        return self._joined(parts, len(logits))

    def broken(self, drawn: Drawn) -> Tensor:
        """[n] bool: rows of the last draw, which gave `drawn`, whose logits mean nothing.

        Constraints may leave an honest row no token, so what they change counts as the model gave
        it.
        """
        broken = drawn.probability == 0
        if self._broken is not None:
            rows, own = self._broken
            broken[rows] = own
        return broken

    def legal(
        self, plan: Plan, proposal: Proposal, accepted: Tensor, schedule: Schedule
    ) -> tuple[Proposal, Tensor, Tensor | None]:
        """What of a proposal, and of its `accepted` [B, L] bool columns, no constraint and no
        grammar refuses now that the columns are filled together; and of requests that cannot go
        on the columns [B] int64 that are legal, -1 of others; None: all can."""
        proposal, accepted, legal = self.grammars.walk(plan, proposal, accepted, self._draw_again)
        accepted = self.constraints.undo_bad_words(accepted, plan, proposal, schedule)
        return proposal, accepted & (proposal.token != self.mask_token_id), legal

    def _draw_again(self, row: int, bits: Tensor) -> int | None:
        """The token for one of the last draw's constrained rows under a bitmask [1, W]."""
        chosen, part = self._groups[-1]
        assert chosen is not None, "constrained rows come last"
        logits = part[row : row + 1].clone()
        logits[:, self.mask_token_id] = -torch.inf
        apply_bits(logits, bits, [0])
        if self._params is None:
            best, token = logits[0].max(0)
            return int(token) if best.isfinite() else None
        drawn = draw_rows(logits, self._params[chosen[row : row + 1]], self.mask_token_id)
        return int(drawn.token) if drawn.probability > 0 else None

    def best_others(self, stuck: Tensor) -> Drawn:
        """The best token but the mask for rows `stuck` [n] bool of the last draw, as if greedy.

        The greedy tokens of all rows of their request were the mask; the reference would repeat
        that step forever.
        """
        parts = []
        for rows, part in self._groups:
            own = stuck if rows is None else stuck[rows]
            part[:, self.mask_token_id].masked_fill_(own, -torch.inf)
            parts.append(draw_rows(part, None, self.mask_token_id, own))
        return self._joined(parts, len(stuck))

    def record(self, plan: Plan, packed: Packed, token: Tensor, used: Tensor) -> None:
        """Keep the log-probabilities of tokens [B, K] int64, where `used` [B, K] bool, that the
        last draw's rows gave."""
        self.logprobs.record(plan, packed, token, used, self._rows_of)
        del self._logits, self._mask_logits  # as large as all that a forward computes

    def _rows_of(self, rows: Tensor) -> Tensor:
        """[n, V] float32: logits of packed rows [n] int64, raw or processed."""
        logits = self._logits.index_select(0, rows).float()
        if not self.logprobs.processed:
            logits[:, self.mask_token_id] = self._mask_logits[rows].float()
            return logits
        for chosen, part in self._groups:
            if chosen is not None:
                place = torch.full((len(self._logits),), -1, device=rows.device)
                place[chosen] = torch.arange(len(chosen), device=rows.device)
                own = place[rows]
                logits = torch.where((own >= 0)[:, None], part[own.clamp(min=0)].float(), logits)
        params = None if self._params is None else self._params[rows]
        return process(logits, params, self.mask_token_id)

    def _texts(self, plan: Plan, packed: Packed) -> Tensor | None:
        """[n] bool: whether a row is not for a canvas position; None: each is for one."""
        end, count = plan.end_of_fill, plan.rows.needed.shape[1]
        if end >= count:  # what lies behind is padding
            return packed.place < plan.num_next if plan.num_next else None
        return (packed.place < plan.num_next) | (packed.place >= end)

    def _row_params(self, plan: Plan, packed: Packed, schedule: Schedule) -> RowParams | None:
        """None where all are greedy and ranked by probability."""
        options, owner, asked = plan.options, packed.owner, schedule.asked
        if not (asked.sampled or asked.scores):
            return None
        # A position's token depends on nothing but seed, position and step.
        row = predicted(plan, schedule.batch, owner, packed.place)
        return RowParams(
            temperature=options.temperature[owner],
            top_p=options.top_p[owner],
            top_k=options.top_k[owner],
            min_p=options.min_p[owner],
            algorithm=options.score[owner],
            draw=uniform(options.rng_seed[owner], row.position, row.step),
            asked=asked,
        )

    def _constrained(
        self, logits: Tensor, plan: Plan, packed: Packed, schedule: Schedule
    ) -> list[tuple[Tensor | None, Tensor]]:
        """Rows to draw from, the later ones in place of the earlier: those without constraints (or
        all, where these are most), and a float32 copy, constrained, of the others."""
        self._broken = None
        flags = self.constraints.constrained[schedule.slots]
        if not flags.any():
            return [(None, logits)]
        if schedule.facts.static:
            owner = np.arange(len(packed.owner)) // schedule.facts.rows
        else:
            owner = packed.owner.numpy()
        constrained = flags[owner]
        groups: list[tuple[Tensor | None, Tensor]] = []
        if 2 * constrained.sum() < len(owner):
            # To copy most rows costs more than to draw from the others twice.
            groups.append((None, logits))
        elif not constrained.all():
            rows = async_tensor_h2d(np.flatnonzero(~constrained), device=logits.device)
            groups.append((rows, logits.index_select(0, rows)))
        if constrained.any():
            chosen = np.flatnonzero(constrained)
            rows = async_tensor_h2d(chosen, device=logits.device)
            part = logits.index_select(0, rows).float()
            self._broken = rows, ~is_sound(part)
            own = Packed(packed.owner[rows], packed.place[rows], None)
            self.grammars.mask(part, plan, own, owner[chosen], schedule)
            self.constraints.apply(part, plan, own, owner[chosen], schedule)
            groups.append((rows, part))
        return groups

    def _joined(self, parts: list[Drawn], count: int) -> Drawn:
        """What was drawn for each group, in the order of the rows."""
        groups, whole = self._groups, parts[0]
        if groups[0][0] is None:
            groups, parts = groups[1:], parts[1:]
        else:
            whole = Drawn(*(field.new_zeros(count) for field in whole))
        for (rows, _), part in zip(groups, parts, strict=True):
            for field, values in zip(whole, part, strict=True):
                field[rows] = values
        return whole
