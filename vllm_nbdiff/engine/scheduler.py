# SPDX-License-Identifier: Apache-2.0
"""Scheduling of canvases: the active block of a request travels as its draft tokens.

A step schedules either prompt tokens or one whole canvas of a request. A denoise step reports no
token and all drafts rejected, so vLLM rolls the computed length back by itself; a commit reports
all of them accepted. There is no bonus token.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_nbdiff import compat
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.engine.counts import Counts
from vllm_nbdiff.engine.lookahead import (
    Share,
    canvas_budget,
    canvas_tokens,
    lookahead_tokens,
    row_limit,
)
from vllm_nbdiff.engine.prefill_share import PrefillShare
from vllm_nbdiff.names import LOGGER
from vllm_nbdiff.request import parse_options

logger = init_logger(LOGGER)


@dataclass
class Canvas:
    """What one request is given."""

    tokens: Share  # of every schedule in which its canvas takes part
    lookahead: int  # tokens behind them that have pages
    kind: str  # one of `compat.KINDS`
    turn: int = 0  # the order in which canvases took part last; 0: not yet


class NBDiffScheduler(Scheduler):
    """vLLM's scheduler with a canvas in place of drafted tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM derives this from `is_diffusion`, which stays false here (see config.py).
        self.num_sampled_tokens_per_step = 0
        self.return_sampling_mask = True  # step maps come in their place (step_map.py)
        compat.share_compiler(self.structured_output_manager)
        compat.name_for_workers(self.structured_output_manager)
        self._config = BlockDiffusionConfig.from_vllm_config(self.vllm_config)
        self._page_size = self.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._row_limit = row_limit(self.vllm_config, self._config)
        self._counts: dict[str, Counts[int]] = {}
        self._graph: str | None = None
        self._canvases: WeakKeyDictionary[Request, Canvas] = WeakKeyDictionary()
        self._turns = itertools.count(1)
        self._prompt_scores: tuple[dict[str, Any], dict[str, Any]] = {}, {}

        # What the worker warms up with; allocations ask each request.
        self.num_lookahead_tokens = self._config.block_length
        compat.allocate_own_lookahead(
            self.kv_cache_manager, lambda request: self._canvases[request].lookahead
        )
        compat.leave_ends_uncached(self.kv_cache_manager)
        most = self.scheduler_config.max_num_batched_tokens
        self._chunk = self._config.block_length if self._config.family.block_causal else 1
        self._share = PrefillShare(min(self.max_num_scheduled_tokens, most), self._chunk)
        self._canvas_budget = canvas_budget(self._config, self._share.budget)
        self._admits = True
        self._refused = False  # the schedule before computed none of the prompts that were wanted
        # By arrival, vLLM preempts the last one of `running`, which are sorted by kind here; by
        # priority, it looks for the one that arrived last among those of the least priority.
        self._ignores_priority = self.scheduler_config.policy == "fcfs"
        self.policy = SchedulingPolicy.PRIORITY

    def add_request(self, request: Request) -> None:
        """Take a new request, with all that its options mean for scheduling."""
        assert request.sampling_params is not None
        options = parse_options(request.sampling_params.extra_args, self._config)
        streams = request.sampling_params.output_kind != RequestOutputKind.FINAL_ONLY
        self._canvases[request] = Canvas(
            tokens=canvas_tokens(options, self._config, self._row_limit, streams),
            lookahead=lookahead_tokens(options, self._config, self._page_size, self._row_limit),
            kind=options.algorithm if options.algorithm in compat.KINDS else options.mode,
        )
        if self._ignores_priority:
            request.priority = 0
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Arm the canvases, then schedule.

        Those that are armed come first and fit, so that the token budget never splits one.
        """
        # Only a request that ends makes room for another one.
        self._admits |= bool(self.finished_req_ids)
        wanted = self._prompt_tokens_wanted()
        reserved = self._share.reserve(wanted)
        # Beside prompts a schedule is one forward, which emits no second block.
        alone = self._config.static_shapes or not wanted or self._refused
        held_back = self._arm(self._share.budget - reserved, alone)
        self.running.sort(key=_is_prefilling)
        output = super().schedule(throttle_prefills)
        canvases = output.scheduled_spec_decode_tokens
        used = sum(n for key, n in output.num_scheduled_tokens.items() if key not in canvases)
        self._refused = wanted > 0 and used == 0
        if held_back and reserved:
            self._share.settle(used)
            self._admits &= used > 0
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Send no masks of grammars, and wait for no tokens to make some: workers mask their rows.

        What is emitted goes through vLLM's own matcher all the same, which ends a request whose
        text it refuses.
        """
        super()._update_after_schedule(scheduler_output)
        scheduler_output.has_structured_output_requests = False
        scheduler_output.pending_structured_output_tokens = False

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End a chunk of a prompt where a block ends, if blocks see all of themselves."""
        end = num_computed_tokens + num_new_tokens
        if end < request.num_tokens:
            num_new_tokens -= end % self._chunk
        return max(num_new_tokens, 0)

    def _prompt_tokens_wanted(self) -> int:
        """Tokens of prompts that the coming schedule could compute with an unlimited budget.

        Of waiting requests the next one counts, unless it has proved not to be admitted.
        """
        prefilling = filter(_is_prefilling, self.running)
        wanted = sum(request.num_tokens - request.num_computed_tokens for request in prefilling)
        if self._admits and self.waiting and len(self.running) < self.max_num_running_reqs:
            wanted += self.waiting.peek_request().num_tokens
        return wanted

    def _arm(self, budget: int, alone: bool) -> int:
        """Give `budget` tokens to canvases, in turn, the least that they need unless `alone`.

        Returns:
            Canvases that are held back: without draft tokens they are left out of the schedule.
        """
        held_back = 0
        decoding = [request for request in self.running if not _is_prefilling(request)]
        share = min(self._canvas_budget, budget) // max(len(decoding), 1) if alone else 0
        for request in sorted(decoding, key=lambda request: self._canvases[request].turn):
            canvas = self._canvases[request]
            if request.num_in_flight_tokens and self._is_cut(request, canvas):
                request.spec_token_ids = []
                continue
            fits = canvas.tokens.least <= budget
            # The next step needs room below the model's length too, whatever this one emits.
            behind = self.max_model_len - request.num_computed_tokens - canvas.tokens.least
            width = canvas.tokens.of(min(share, budget, behind)) if fits else 0
            if len(request.spec_token_ids) != width:
                request.spec_token_ids = [-1] * width
            if fits:
                budget -= width
                canvas.turn = next(self._turns)
            else:
                held_back += 1
        return held_back

    def _is_cut(self, request: Request, canvas: Canvas) -> bool:
        """Whether less than a canvas fits below the model's length, behind what is in flight.

        Such a step is not computed; two of them in turn would leave room for a whole one never.
        """
        return request.num_computed_tokens + canvas.tokens.least > self.max_model_len

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Update with what the worker computed, and what that took."""
        counts = compat.counts_of(model_runner_output)
        self._counts = {name: Counts(*row) for name, row in counts.items()}
        self._graph = compat.graph_of(model_runner_output)
        self._hold_prompt_scores(model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        broken = [name for name, own in self._counts.items() if own.broken]
        for name in broken:
            pages = itertools.chain(*self.kv_cache_manager.get_block_ids(name))
            self.kv_cache_manager.evict_blocks(set(pages))
        self._end(broken, RequestStatus.FINISHED_ERROR, "broken logits or grammar", outputs)
        stuck = [name for name, own in self._counts.items() if own.stuck and not own.broken]
        why = "its grammar and its other constraints leave no token"
        self._end(stuck, RequestStatus.FINISHED_ABORTED, why, outputs)
        return outputs

    def _end(self, names: list[str], status: RequestStatus, why: str, outputs: Any) -> None:
        """End requests that are not finished yet, and tell their clients."""
        for request in self.finish_requests(names, status) if names else ():
            logger.error("Request %s ended: %s", request.request_id, why)
            client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )

    def _hold_prompt_scores(self, output: ModelRunnerOutput) -> None:
        """Let log-probabilities of prompts wait for the first tokens, with which vLLM sends them.

        A prompt's end emits none here.
        """
        arrived = output.prompt_logprobs_dict, output.prompt_token_id_logprobs_dict
        for waiting, scores in zip(self._prompt_scores, arrived, strict=True):
            waiting.update(scores)
            scores.clear()
            for name in tuple(waiting):
                index = output.req_id_to_index.get(name)
                if name not in self.requests:
                    del waiting[name]
                elif index is not None and output.sampled_token_ids[index]:
                    scores[name] = waiting.pop(name)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Count model forwards, canvas positions evaluated and committed tokens.

        The worker may run several forwards in one scheduled step.
        """
        if not self.log_stats:
            return None
        counts, kind = self._counts[request_id], self._canvases[self.requests[request_id]].kind
        more = (
            *(counts.guesses, counts.hits, counts.singles, counts.drafted, counts.accepted),
            *(counts.fan_outs, counts.fan_hits),
        )
        stats = compat.add_counts(spec_decoding_stats, more, kind, counts.rows, self._graph)
        stats.num_drafts += counts.forwards
        stats.num_draft_tokens += counts.rows
        stats.num_accepted_tokens += num_accepted_tokens
        return stats


class NBDiffAsyncScheduler(NBDiffScheduler, AsyncScheduler):
    """The same with the next step scheduled while one is in flight."""


def _is_prefilling(request: Request) -> bool:
    """Whether tokens of the request, its prompt's or those from before preemption, lack KV."""
    return request.num_computed_tokens < request.num_tokens


def make_scheduler(*args: Any, **kwargs: Any) -> NBDiffScheduler:
    """The scheduler for a configuration (vLLM decides on async scheduling after our hook)."""
    vllm_config = kwargs["vllm_config"]
    is_async = vllm_config.scheduler_config.async_scheduling
    return (NBDiffAsyncScheduler if is_async else NBDiffScheduler)(*args, **kwargs)
