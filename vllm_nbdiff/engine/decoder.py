# SPDX-License-Identifier: Apache-2.0
"""Decoding: plans forwards of the scheduled batch, and decides what follows from their logits.

Everything that is decided is a function of `vllm_nbdiff.decoding` on the model's device. On a CPU
a schedule has several forwards, each of the rows that it needs; elsewhere one, in the runner's
rows, between which nothing is read back but what grammars ask for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_nbdiff.decoding import decide, fan_out, versions
from vllm_nbdiff.decoding.canvas import NO_TOKEN, Canvas, CanvasTable
from vllm_nbdiff.decoding.decide import Proposal, Text
from vllm_nbdiff.decoding.emitted import Emitted
from vllm_nbdiff.decoding.indices import indices
from vllm_nbdiff.decoding.logprobs import Filled, decided
from vllm_nbdiff.decoding.plan import Plan, fixed_columns, make_plan
from vllm_nbdiff.decoding.rows import Packed, pack
from vllm_nbdiff.decoding.sampling import Drawn
from vllm_nbdiff.engine.counts import Tally
from vllm_nbdiff.engine.options import OptionTable
from vllm_nbdiff.engine.sampler import RowSampler
from vllm_nbdiff.engine.schedule import Schedule
from vllm_nbdiff.engine.step_map import StepTable


class Decoder:
    """One forward's plan and decisions."""

    def __init__(
        self, table: CanvasTable, options: OptionTable, sampler: RowSampler, steps: StepTable
    ) -> None:
        """With canvases and options of all requests, the sampler of the rows they need, and the
        steps that filled what is asked for them."""
        self.table = table
        self.options = options
        self.sampler = sampler
        self.steps = steps
        # By the last forward:
        self.verified: fan_out.VerifiedTexts | None = None
        self._filled: Filled | None = None

    def begin(self, schedule: Schedule) -> None:
        """Take the batch of a schedule."""
        self.schedule = schedule
        count, device = len(schedule.slots), self.table.tokens.device
        most = int(schedule.scheduled[schedule.decodes].max(initial=1))
        self._options = self.options.read(schedule.slots, schedule.batch.slot)
        self.emitted, self.tally = Emitted(count, most, device), Tally(self._options.verifies)
        self._state = self.table.read(schedule.batch.slot)
        self.sampler.logprobs.begin(schedule, self._first_emitted)
        self.steps.begin(schedule, self._options, self._first_emitted)

    def _first_emitted(self) -> Tensor:
        """[B] int64: position of the first token that each request may emit."""
        batch, start = self.schedule.batch, self._state.start
        if self.schedule.facts.family.block_causal:
            start = start + fixed_columns(self._options, start)
        return torch.where(batch.decodes, start, batch.computed + batch.scheduled)

    def end(self) -> None:
        """Store the canvases of the schedule's requests."""
        self.table.write(self.schedule.batch.slot, self._state)

    def plan(self) -> Plan:
        """What the coming forward does, from the canvases as they are now."""
        batch, facts = self.schedule.batch, self.schedule.facts
        self._plan = make_plan(self.table, self._state, self._options, batch, facts)
        self._packed = pack(self._plan.rows, facts)
        return self._plan

    def logits_rows(self, begin: Tensor) -> Tensor:
        """[n] int64: rows of the forward that need logits; those of a request start at `begin`
        [B]."""
        packed = self._packed
        offset = packed.of(self._plan.rows.offset)
        if packed.valid is not None:
            offset = torch.where(packed.valid, offset, 0)
        return begin[packed.owner] + offset

    def row_owners(self) -> Tensor:
        """[n] int64: batch index of the request of each of those rows."""
        return self._packed.owner

    def decide(self, logits: Tensor) -> None:
        """Take the logits [n, V] of those rows; changes canvases and what is emitted."""
        plan, packed, facts = self._plan, self._packed, self.schedule.facts
        self.tally.add_forward(plan.segments.length)
        self.verified = self._filled = None
        if not ((reads := self._worth(plan.reads)) or len(packed.owner)):
            return
        emitted_before = self.emitted.count
        spread = self._draw(logits, packed)
        state = plan.state
        looked = (plan.look & ~plan.ahead) if facts.fuses else plan.look
        if reads:
            state, kept = self._read_text(spread)
            looked = looked | kept if facts.fuses else looked
        if facts.denoises and self._worth(looked):
            state = self._fill(spread, packed, state, looked)
        if self.sampler.logprobs.asked and len(packed.owner):
            self.sampler.record(plan, packed, *decided(plan, spread[0], self._filled))
        if self.steps.asked:
            self.steps.record(plan, state, looked, self._filled)
        self._state = state
        self.sampler.grammars.end_requests(self.schedule, self.tally, self.emitted, emitted_before)

    def _find_broken(self, drawn: Drawn) -> None:
        """Find requests whose logits mean nothing."""
        packed = self._packed
        broken = self.sampler.broken(drawn)
        if packed.valid is not None:
            broken &= packed.valid
        if self._worth(broken):
            rows = torch.zeros_like(self.schedule.batch.slot)
            self.tally.add_broken(rows.index_add_(0, packed.owner, broken.long()))

    def _draw(self, logits: Tensor, packed: Packed) -> list[Tensor]:
        """[B, K] each: tokens, probabilities and confidences of needed rows, 0 elsewhere."""
        plan = self._plan
        if not len(packed.owner):
            # A block is committed, or a prompt ends, that no seed follows.
            nothing = torch.zeros_like(plan.rows.offset)
            return [nothing, nothing.float(), nothing.float()]
        drawn = self.sampler.draw(logits, plan, packed, self.schedule)
        self._find_broken(drawn)
        spread = [self._spread(drawn.token), self._spread(drawn.probability)]
        # Greedy rows that are ranked by probability have one tensor for both.
        same = drawn.confidence is drawn.probability
        return [*spread, spread[1] if same else self._spread(drawn.confidence)]

    def _worth(self, flags: Tensor) -> bool:
        """Whether any flag is set, where that may be asked."""
        return self.schedule.facts.static or bool(flags.any())

    def _spread(self, values: Tensor) -> Tensor:
        """[B, K]: what was drawn for packed rows, where it belongs."""
        return self._packed.spread(values, *self._plan.rows.needed.shape)

    def _read_text(self, spread: list[Tensor]) -> tuple[Canvas, Tensor]:
        """Commit or verify canvases, begin the next ones; [B] bool: which of those to fill."""
        plan, batch, facts = self._plan, self.schedule.batch, self.schedule.facts
        following, chance = (field[:, : plan.num_next] for field in spread[:2])
        needed = plan.rows.needed[:, : plan.num_next]
        empty = self.sampler.grammars.empty(needed, chance, self.schedule)
        text = decide.read_text(self.table, plan, batch, facts, following, empty)
        self.sampler.constraints.keep_text(plan, text.length, self.schedule)
        self._emit(plan.state.tokens, text.length, plan.state.start)
        if plan.ends is not None:
            self.emitted.ended |= plan.ends & (text.length == plan.text)
        if facts.family.seed != "never":
            self._end_with_seeds(text, empty)
        state = decide.begin_canvases(self.table, plan, text, batch, facts)
        hit = None
        if facts.drafts and self._worth(plan.canvases.exists):
            token, chance = (self._of_canvases(field) for field in spread[:2])
            found = fan_out.drafts(plan, text, token, chance, facts.mask_token_id)
            state, hit = fan_out.keep(self.table, batch, facts, state, found), found.hit
        self._count_text(plan, text, hit)
        if facts.family.thinking_budget:
            state = self.sampler.constraints.end_thinking(state, plan.reads, self.schedule)
        return state, text.kept

    def _end_with_seeds(self, text: Text, empty: Tensor | None) -> None:
        """End requests of which the seed behind their text is the last token, whose KV nothing
        needs, and lose those in whose row no token was left.

        Args:
            empty: [B, N] bool, rows of texts in which no token was left; None: there are none.
        """
        batch, emitted, lost = self.schedule.batch, self.emitted, None
        if empty is not None:
            reads = self._plan.reads & ~emitted.ended
            lost = self.sampler.grammars.lose(reads, text.length, empty, self.schedule)
        own = text.seed[:, None], text.begin[:, None]
        ends = self.table.is_last(batch.slot, self._plan.options, *own)[:, 0]
        if not self._worth(ends):
            return
        ends &= (text.length > 0) & ~emitted.ended & (emitted.count < batch.scheduled)
        ends = ends if lost is None else ends & ~lost
        emitted.append(text.seed[:, None], ends.long())
        emitted.ended |= ends

    def _emit(self, tokens: Tensor, columns: Tensor, start: Tensor) -> None:
        """Emit the first `columns` [B] of canvases `tokens` [B, L] at `start` [B], no prompt."""
        if self.schedule.facts.family.block_causal:
            fixed = fixed_columns(self._options, start)
            places = self.table.columns + fixed[:, None]
            tokens = tokens.gather(1, places.clamp(max=tokens.shape[1] - 1))
            columns = (columns - fixed).clamp(min=0)
        self.emitted.append(tokens, columns)

    def _fill(self, spread: list[Tensor], packed: Packed, state: Canvas, looked: Tensor) -> Canvas:
        """Fill canvases of the requests `looked` [B] bool."""
        plan, schedule = self._plan, self.schedule
        batch, facts = schedule.batch, schedule.facts
        level = self._level(spread)
        proposal = Proposal(
            versions.of_level(plan.canvases.tokens, level),
            versions.of_level(plan.canvases.active, level),
            *(versions.of_level(self._of_canvases(field), level) for field in spread),
        )
        accepted = decide.choose(plan, proposal, looked, facts)
        proposal, accepted, legal = self.sampler.legal(plan, proposal, accepted, schedule)
        stuck = decide.stuck(proposal, accepted, looked, facts)
        if legal is not None:  # or ends with this forward
            stuck &= legal < 0
        if self._worth(stuck):
            proposal, accepted = self._unstick(packed, proposal, accepted, stuck, level)
        self._filled = Filled(proposal.token, accepted, level)
        guess = None
        if facts.guesses:
            guess = torch.where(plan.rows.needed[:, -1], spread[0][:, -1], NO_TOKEN)
        state = decide.fill(
            self.table, plan, batch, facts, state, proposal, looked, accepted, guess
        )
        if level is not None:  # versions that are right stand for a step each
            state = state._replace(step=state.step + torch.where(looked, level, 0))
        # A filled position never changes, so what ends a request needs no commit.
        ends = decide.early_ends(self.table, plan, batch, facts, state, looked)
        if legal is not None:
            ends = torch.where((legal < 0)[:, None], ends, self.table.columns == legal[:, None] - 1)
        if self._worth(ends):
            room = torch.where(self.emitted.ended, 0, batch.scheduled - self.emitted.count)
            if facts.family.block_causal:
                room = room + fixed_columns(self._options, state.start)
            count = ends.cumsum(1).eq(0).sum(1) + 1
            count = torch.where(ends.any(1) & (count <= room), count, 0)
            self._emit(state.tokens, count, state.start)
            self.emitted.ended |= count > 0
        return state

    def _of_canvases(self, values: Tensor) -> Tensor:
        """[B, C, L]: of [B, K] rows those of the canvases."""
        shape, first = self._plan.canvases.tokens.shape, self._plan.num_next
        return values[:, first : first + shape[1] * shape[2]].reshape(shape)

    def _level(self, spread: list[Tensor]) -> Tensor | None:
        """[B] int64: which version of its canvas each request goes on from; None: the canvas."""
        if not self.schedule.facts.versions:
            return None
        plan = self._plan
        token, confidence = self._of_canvases(spread[0]), self._of_canvases(spread[2])
        return versions.last_right(
            plan.canvases.tokens, plan.canvases.exists, plan.canvases.active, token, confidence
        )

    def _unstick(
        self,
        packed: Packed,
        proposal: Proposal,
        accepted: Tensor,
        stuck: Tensor,
        level: Tensor | None,
    ) -> tuple[Proposal, Tensor]:
        """Fill the likeliest position of each `stuck` [B] request with its best other token."""
        wanted = torch.zeros_like(self._plan.canvases.active)
        requests = indices(len(stuck), stuck.device)
        of_stuck = proposal.active & stuck[:, None]
        if self.schedule.facts.edits:
            of_stuck &= proposal.canvas == self.schedule.facts.mask_token_id
        wanted[requests, 0 if level is None else level] = of_stuck
        begin = torch.zeros_like(self._plan.rows.needed[:, : self._plan.num_next])
        rows = packed.of(torch.cat([begin, wanted.flatten(1)], dim=1))
        if packed.valid is not None:
            rows &= packed.valid
        other = self.sampler.best_others(rows)
        token, probability = (
            versions.of_level(self._of_canvases(self._spread(field)), level)
            for field in (other.token, other.probability)
        )
        mask = self.schedule.facts.mask_token_id
        return decide.take_likeliest(proposal, accepted, of_stuck, token, probability, mask)

    def _count_text(self, plan: Plan, text: Text, hit: Tensor | None) -> None:
        """Count what was read; `hit` [B] bool: whose next draft is there; None: nobody's."""
        facts = self.schedule.facts
        if facts.guesses:
            self.tally.add_guesses(plan.ahead, text.kept)
        if facts.verifies:
            self.tally.add_texts(plan.text, text.length)
            if facts.fan_out and hit is not None:
                self.tally.add_fan_outs(*fan_out.made(plan, hit))
            self.verified = fan_out.VerifiedTexts(plan, text.length, hit)

    def goes_on(self) -> bool:
        """Whether another forward may run before the scheduler has to know.

        Only where values may be read. Not with prompts in the batch, once a request ended, or
        where one has no room for more tokens in this schedule.
        """
        schedule, emitted = self.schedule, self.emitted
        if schedule.facts.static or schedule.facts.prefills or any(emitted.ended.tolist()):
            return False
        if not any(emitted.count.tolist()):
            return True
        return all((self._state.width <= schedule.batch.scheduled - emitted.count).tolist())
