# SPDX-License-Identifier: Apache-2.0
"""Scheduling of canvases: the active block of a request travels as its draft tokens.

A step schedules either prompt tokens or one whole canvas of a request. A denoise step reports no
token and all drafts rejected, so vLLM rolls the computed length back by itself; a commit reports
all of them accepted. There is no bonus token.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.engine.counts import unpack
from vllm_nbdiff.engine.drafts import draft_room
from vllm_nbdiff.request import RequestOptions, parse_options


class NBDiffScheduler(Scheduler):
    """vLLM's scheduler with a canvas in place of drafted tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM derives this from `is_diffusion`, which stays false here (see config.py).
        self.num_sampled_tokens_per_step = 0
        self._config = BlockDiffusionConfig.from_vllm_config(self.vllm_config)
        self._page_size = self.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._counts: dict[str, int] = {}

    def canvas_width(self, options: RequestOptions) -> int:
        """Most tokens that a schedule may emit for a request; a block is emitted whole."""
        if options.mode == "diffusion":
            return options.block_length
        # On the device a schedule is one forward: of a draft no more than its rows.
        one_draft = self._config.decoder == "device" and options.mode != "auto"
        return options.draft_width if one_draft else self._config.block_length

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Arm the canvases, then schedule.

        Decoding requests come first, so that the token budget never splits a canvas: the config
        hook made sure that one canvas for every sequence fits.
        """
        spare = 0
        for request in self.running:
            if request.num_computed_tokens >= request.num_tokens:
                assert request.sampling_params is not None
                options = parse_options(request.sampling_params.extra_args, self._config)
                width = self.canvas_width(options)
                if len(request.spec_token_ids) != width:
                    request.spec_token_ids = [-1] * width
                spare = max(spare, draft_room(options.num_drafts, width, self._page_size))
        # Pages for the next block, whose first denoise step may share a forward with this commit,
        # and for drafts.
        self.num_lookahead_tokens = self._config.block_length + spare
        self.running.sort(key=lambda request: request.num_computed_tokens < request.num_tokens)
        return super().schedule(throttle_prefills)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Take the worker's counts out of the output, then update as usual.

        They ride in `num_nans_in_logits`, the one per-request integer of the worker's output; see
        `NBDiffSampler`.
        """
        self._counts = model_runner_output.num_nans_in_logits or {}
        model_runner_output.num_nans_in_logits = None
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Count model forwards, canvas positions evaluated and committed tokens.

        The worker may run several forwards in one scheduled step. Guessed seeds travel in lists
        that mean nothing else for diffusion; see `compat._diffusion_counters`.
        """
        if not self.log_stats:
            return None
        stats = spec_decoding_stats or SpecDecodingStats.new(2)
        counts = unpack(self._counts[request_id])
        stats.num_drafts += counts.forwards
        stats.num_draft_tokens += counts.rows
        stats.num_accepted_tokens += num_accepted_tokens
        stats.num_draft_tokens_per_pos[0] += counts.guesses
        stats.num_accepted_tokens_per_pos[0] += counts.hits
        stats.num_accepted_tokens_per_pos[1] += counts.singles
        return stats


class NBDiffAsyncScheduler(NBDiffScheduler, AsyncScheduler):
    """The same with the next step scheduled while one is in flight."""


def make_scheduler(*args: Any, **kwargs: Any) -> NBDiffScheduler:
    """The scheduler for a configuration (vLLM decides on async scheduling after our hook)."""
    vllm_config = kwargs["vllm_config"]
    is_async = vllm_config.scheduler_config.async_scheduling
    return (NBDiffAsyncScheduler if is_async else NBDiffScheduler)(*args, **kwargs)
