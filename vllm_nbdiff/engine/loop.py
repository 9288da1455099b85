# SPDX-License-Identifier: Apache-2.0
"""The forwards of one schedule, which ends when the scheduler has something to decide."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.rows import TokenRows, token_rows
from vllm_nbdiff.engine.adapters import AdapterTable, canvas_rows
from vllm_nbdiff.engine.auto import AutoDrafts
from vllm_nbdiff.engine.decoder import Decoder
from vllm_nbdiff.engine.forward import Forward, PagedBatch
from vllm_nbdiff.engine.schedule import Schedule


class ForwardLoop:
    """Runs the forwards that a decoder plans.

    The first one is the runner's. Where shapes are static it has the runner's rows and is the only
    one; elsewhere it has rows of its own, and others follow.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        auto: AutoDrafts,
        steps_per_schedule: int,
        seconds_per_schedule: float,
        adapters: AdapterTable | None = None,
    ) -> None:
        """
        Args:
            model: of vLLM, one of `families`.
            decoder: of all requests.
            auto: chooses how much requests of mode `auto` draft.
            steps_per_schedule: most forwards of a schedule.
            seconds_per_schedule: none begins later than that in a schedule, so that new requests
                and aborts are seen.
            adapters: of all requests; None: the server has none.
        """
        self.model = model
        self.decoder = decoder
        self.auto = auto
        self.steps_per_schedule = steps_per_schedule
        self.seconds_per_schedule = seconds_per_schedule
        self.adapters = adapters
        self.forward: Forward | None = None
        self.graph: str | None = None
        """Which of `compat.metrics.GRAPHS` the forward runs in; None: shapes are not static."""

    def begin(self, schedule: Schedule, paged: PagedBatch) -> dict[str, Any]:
        """Attention metadata of a schedule's first forward, whose rows of logits are set."""
        self._paged, self._began = paged, perf_counter()
        # The rows of prompts mostly need no logits.
        self._is_timed = not schedule.facts.prefills
        self.auto.begin_schedule(schedule)
        self.decoder.begin(schedule)
        plan, runner = self.decoder.plan(), paged.input_batch
        if schedule.facts.static:
            metadata = paged.in_place(plan, schedule.batch, schedule.facts, schedule.longest)
            runner.logits_indices = self.decoder.logits_rows(runner.query_start_loc)
            if self.adapters is not None:
                # What the device knows as well, of the host.
                requests = np.arange(len(schedule.slots))
                tokens = requests.repeat(schedule.scheduled)
                logits = requests.repeat(schedule.facts.rows)
                self.adapters.begin_forward(schedule.slots, tokens, logits)
                if self.adapters.draft_only(schedule.slots).any():
                    rows = token_rows(plan.segments, (runner.query_start_loc, runner.num_tokens))
                    self._keep_to_drafts(plan, rows, runner.logits_indices)
            return metadata
        self.forward = paged.forward(plan, schedule.batch, schedule.facts)
        if self.forward is None:
            # There is nothing to compute: the runner's rows must not write KV.
            self._is_timed = False
            paged.slot_mappings.fill_(PAD_SLOT_ID)
            runner.logits_indices = torch.zeros(0, dtype=torch.int64)
            return paged.of_runner(int(runner.seq_lens.max()))
        self.auto.begin_forward(len(self.forward.input_ids))
        runner.logits_indices = self._needed_rows(self.forward)
        self._set_adapters(plan, self.forward, runner.logits_indices)
        if schedule.scores_prompt:
            # vLLM scores prompts where the runner laid them out.
            order = self._rows_of_runner(self.forward)
            self.forward.order = torch.cat([order, torch.arange(len(self.forward.input_ids))])
            runner.logits_indices = runner.logits_indices + len(order)
        return self.forward.metadata

    def _rows_of_runner(self, forward: Forward) -> torch.Tensor:
        """[n] int64: rows of a forward of its own rows that hold the runner's; of canvases any."""
        runner = self._paged.input_batch
        count = forward.segments.length.sum(1)
        scheduled = torch.from_numpy(runner.num_scheduled_tokens[: len(count)])
        owner = torch.arange(len(count)).repeat_interleave(scheduled)
        offset = torch.arange(len(owner)) - runner.query_start_loc[owner]
        begin = forward.rows.begin
        last = (begin + count - 1).clamp(min=0)
        return torch.minimum(begin[owner] + offset, last[owner])

    def _set_adapters(self, plan: Plan, forward: Forward, needed: torch.Tensor) -> None:
        """Of a forward of its own rows, which needs logits of the rows `needed` [n] int64."""
        if self.adapters is not None:
            tokens, logits = forward.rows.owner, self.decoder.row_owners()
            slots = self.decoder.schedule.slots
            self.adapters.begin_forward(slots, tokens.numpy(), logits.numpy())
            if self.adapters.draft_only(slots).any():
                self._keep_to_drafts(plan, forward.rows, needed)

    def _keep_to_drafts(self, plan: Plan, rows: TokenRows, needed: torch.Tensor) -> None:
        """Have draft-only adapters act in rows of canvases alone."""
        assert self.adapters is not None
        slots, drafts = self.decoder.schedule.slots, canvas_rows(plan, rows)
        self.adapters.keep_to_drafts(slots, rows.owner, drafts, needed)

    def _needed_rows(self, forward: Forward) -> torch.Tensor:
        """[n] int64, the rows of a forward of its own rows that need logits."""
        return self.decoder.logits_rows(forward.rows.begin)

    def run(self, logits: torch.Tensor) -> None:
        """Decide the first forward, and run and decide those that follow it."""
        decoder, auto = self.decoder, self.auto
        decoder.decide(logits)
        auto.observe_drafts(decoder.verified)
        if self._is_timed:
            auto.observe_forward(perf_counter() - self._began)
        forwards = 1
        while forwards < self.steps_per_schedule and decoder.goes_on():
            began = perf_counter()
            if began - self._began > self.seconds_per_schedule:
                break
            forwards += 1
            schedule = decoder.schedule
            plan = decoder.plan()
            forward = self._paged.forward(plan, schedule.batch, schedule.facts)
            if forward is None:
                break
            auto.begin_forward(len(forward.input_ids))
            needed = self._needed_rows(forward)
            self._set_adapters(plan, forward, needed)
            hidden = self.model(input_ids=None, positions=forward.rows.position, segments=forward)
            logits = self.model.compute_logits(hidden.index_select(0, needed))
            decoder.decide(logits)
            auto.observe_drafts(decoder.verified)
            auto.observe_forward(perf_counter() - began)
        decoder.end()
        broken = decoder.tally.broken
        facts = decoder.schedule.facts
        if broken is not None and not facts.static:
            self._paged.heal(broken.nonzero()[:, 0])
        if self.adapters is not None and decoder.schedule.scores_prompt:
            self.adapters.score_prompts(decoder.schedule.slots, decoder.schedule.scheduled)
        auto.end_schedule(decoder.emitted, self._is_timed)
