# SPDX-License-Identifier: Apache-2.0
"""Canvases in the middle of a block and what a denoise step decides of them, with static shapes.

The functions are those of the engine, which on a GPU reads nothing back either. What finds nothing
to do in such a step is left out: prompts, text to commit or verify, constraints, another look at
rows whose best token is the mask.

N greedy requests, canvases of L columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_nbdiff.decoding import decide
from vllm_nbdiff.decoding.canvas import NO_LIMIT, NO_TOKEN, Canvas, CanvasTable, Options
from vllm_nbdiff.decoding.decide import Proposal
from vllm_nbdiff.decoding.plan import Batch, Facts, Plan, make_plan
from vllm_nbdiff.decoding.rows import Packed, pack, token_rows
from vllm_nbdiff.decoding.rules import CONFIDENCE
from vllm_nbdiff.decoding.sampling import Asked, Drawn, RowParams

THRESHOLD = 0.9


class Step(NamedTuple):
    """A planned forward."""

    plan: Plan
    packed: Packed
    tokens: Tensor
    """[N * L] int64: what the forward reads."""
    rows: Tensor
    """[N * sub_block] int64: which of its rows need logits."""


class Canvases:
    """State of N requests; every step starts from the same canvases."""

    def __init__(
        self, tokens: Tensor, context: int, sub_block: int, vocab_size: int, mask_token_id: int
    ) -> None:
        """
        Args:
            tokens: [N, L] int64, with masks to fill.
            context: tokens of text before each canvas.
            sub_block: positions that a step looks at.
            vocab_size: of the model.
            mask_token_id: of the positions to fill.
        """
        self.device = tokens.device
        self.count, length = tokens.shape
        self.vocab_size = vocab_size
        # The second half of the table takes the results.
        self.table = CanvasTable(2 * self.count, length, vocab_size, self.device)
        self.slot = torch.arange(self.count, device=self.device)
        self.begin = torch.arange(self.count + 1, device=self.device) * length
        self.facts = Facts(
            mask_token_id=mask_token_id,
            max_model_len=context + length,
            page_size=length,
            rules=(0,),
            static=True,
            prefills=False,
            verifies=False,
            fuses=False,
            caches=False,
            limits=False,
            rows=sub_block,
        )
        self.options = self._options(context, length, sub_block)
        self.batch = Batch(
            slot=self.slot,
            decodes=self._column(True),
            scheduled=self._column(length),
            computed=self._column(context),
            prompt_ends=self._column(False),
            room=self._column(context + length),
            max_rows=self._column(length),
        )
        state = Canvas(
            tokens=tokens,
            start=self._column(context),
            width=self._column(length),
            step=self._column(1),
            guess=self._column(NO_TOKEN),
            cached=self._column(-1),
            copied=self._column(0),
            edits_left=self._column(0),
        )
        self.table.write(self.slot, state)

    def _column(self, value: bool | int | float) -> Tensor:
        """[N] bool, int64 or float32."""
        return torch.full((self.count,), value, device=self.device)

    def _options(self, context: int, length: int, sub_block: int) -> Options:
        no, zero = self._column(False), self._column(0)
        return Options(
            block_length=self._column(length),
            sub_block_length=self._column(sub_block),
            max_steps=self._column(NO_LIMIT),
            max_versions=zero,
            fan_out=zero,
            last_position=self._column(NO_LIMIT),
            prompt_length=self._column(context),
            first_stop=self._column(context),
            rule=zero,
            score=self._column(CONFIDENCE),
            top_k=self._column(self.vocab_size),
            rng_seed=zero,
            max_post_steps=zero,
            threshold=self._column(THRESHOLD),
            least_chance=self._column(0.0),
            least_survival=self._column(0.0),
            editing_threshold=self._column(1.0),
            temperature=self._column(0.0),
            top_p=self._column(1.0),
            min_p=self._column(0.0),
            verifies=no,
            drafts=no,
            fuses=no,
            constrained=no,
            caches=no,
            splits=no,
            edits=no,
        )

    def row_params(self) -> RowParams:
        """Of the rows that need logits."""
        owner = self.slot.repeat_interleave(self.facts.rows)
        options = self.options
        return RowParams(
            temperature=options.temperature[owner],
            top_p=options.top_p[owner],
            top_k=options.top_k[owner],
            min_p=options.min_p[owner],
            algorithm=options.score[owner],
            draw=torch.zeros(len(owner), dtype=torch.float64, device=self.device),
            asked=Asked(greedy=True, sampled=False, filters=False, scores=False),
        )

    def plan(self) -> Step:
        """What the forward of the canvases does."""
        state = self.table.read(self.slot)
        plan = make_plan(self.table, state, self.options, self.batch, self.facts)
        packed = pack(plan.rows, self.facts)
        length = len(self.table.columns)
        rows = token_rows(plan.segments, (self.begin, self.count * length))
        assert packed.valid is not None
        offset = torch.where(packed.valid, packed.of(plan.rows.offset), 0)
        return Step(
            plan,
            packed,
            tokens=rows.tokens(plan.segments, None, self.batch.decodes),
            rows=self.begin[packed.owner] + offset,
        )

    def decide(self, step: Step, drawn: Drawn) -> Canvas:
        """The canvases after the step, in which `drawn` was drawn for the rows that need logits."""
        plan, first = step.plan, step.plan.num_next
        count, rows = plan.rows.needed.shape
        spread = (step.packed.spread(field, count, rows)[:, first:] for field in drawn)
        proposal = Proposal(plan.canvases.tokens[:, 0], plan.canvases.active[:, 0], *spread)
        accepted = decide.choose(plan, proposal, plan.look, self.facts)
        accepted &= proposal.token != self.facts.mask_token_id
        state = decide.fill(
            self.table,
            plan,
            self.batch,
            self.facts,
            plan.state,
            proposal,
            plan.look,
            accepted,
            None,
        )
        self.table.write(self.slot + self.count, state)
        return state
