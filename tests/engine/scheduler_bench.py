# SPDX-License-Identifier: Apache-2.0
"""A scheduler without an engine."""

from collections import Counter, deque
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.conftest import MASK
from vllm_nbdiff.engine.scheduler import NBDiffScheduler, make_scheduler

L, PAGE = 32, 32
WIDTHS = (L, 2 * L, 8)


class Bench:
    """A scheduler, and a worker that commits a block in every second forward of a request.

    Asynchronous, an output arrives when the next schedule is made.
    """

    def __init__(
        self, checkpoint: Path, num_pages: int, async_scheduling: bool = False, **arguments: Any
    ) -> None:
        overrides = {
            "architectures": ["NBDiffForCausalLM"],
            "block_length": L,
            "mask_token_id": MASK,
        }
        config = EngineArgs(
            model=str(checkpoint),
            hf_overrides=overrides,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=2048,
            block_size=PAGE,
            **{"enable_prefix_caching": False} | arguments,
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = num_pages
        config.scheduler_config.async_scheduling = async_scheduling  # off on CPU
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler: NBDiffScheduler = make_scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_pages, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=PAGE,
        )
        self.scheduled = Counter[str]()  # times that a request was scheduled
        self.preempted = list[str]()
        self.prompt_tokens = 0  # of the last schedule
        self._arrivals = 0
        self._in_flight = deque[tuple[SchedulerOutput, ModelRunnerOutput]]()
        self._depth = int(async_scheduling)

    def add(
        self,
        name: str,
        prompt: int | list[int],
        max_tokens: int = 1024,
        extra: Any = None,
        priority: int = 0,
    ) -> Request:
        """Let a request arrive whose prompt is given, or so many tokens long."""
        self._arrivals += 1
        request = Request(
            name,
            [1] * prompt if isinstance(prompt, int) else prompt,
            SamplingParams(
                max_tokens=max_tokens,
                ignore_eos=True,
                extra_args=extra,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
            None,
            arrival_time=self._arrivals,
            priority=priority,
            block_hasher=get_request_block_hasher(PAGE, sha256),
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> SchedulerOutput:
        """One schedule, and the output of its forward or, asynchronous, of the one before."""
        scheduled = self.scheduler.schedule()
        self.preempted += sorted(scheduled.preempted_req_ids or ())
        self.prompt_tokens = scheduled.total_num_scheduled_tokens
        for canvas in scheduled.scheduled_spec_decode_tokens.values():
            assert len(canvas) in WIDTHS, "a canvas was split"
            self.prompt_tokens -= len(canvas)
        self._in_flight.append((scheduled, self._output(scheduled)))
        if len(self._in_flight) > self._depth:
            self.scheduler.update_from_output(*self._in_flight.popleft())
        return scheduled

    def _output(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        tokens = []
        for name in scheduled.num_scheduled_tokens:
            self.scheduled[name] += 1
            width = len(scheduled.scheduled_spec_decode_tokens.get(name, ()))
            commits = self.scheduled[name] % 2 == 0
            tokens.append([2] * min(width, L) if commits else [])
        names = list(scheduled.num_scheduled_tokens)
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens)

    def pages(self, request: Request) -> int:
        """Pages that the request holds."""
        return len(self.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0])

    def prefill(self, request: Request) -> int:
        """Schedules until the prompt of the request is computed."""
        for count in range(200):
            if request.num_computed_tokens >= request.num_prompt_tokens:
                return count
            self.step()
        raise AssertionError("the prompt is starved")
