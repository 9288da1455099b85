# SPDX-License-Identifier: Apache-2.0
"""The worker's process: model runner, kernels, and what it sends to the scheduler."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

from vllm_nbdiff.compat.patching import patch
from vllm_nbdiff.names import is_block_diffusion


def select_v2_model_runner() -> None:
    """Select model runner V2 for our models.

    Symptom: without Triton's CPU backend vLLM falls back to runner V1, which has no `ModelState`.
    Upstream: `VllmConfig.use_v2_model_runner`, `VllmConfig._validate_v2_model_runner`
    (vllm/config/vllm.py) and `Worker.__init__` (vllm/v1/worker/gpu_worker.py), which asks for
    Triton once more in vLLM 0.33.
    Remove when V2 is the CPU default without Triton, or Triton ships a CPU backend.
    """
    from vllm.config import VllmConfig

    def use_v2(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def used(self: Any) -> bool:
            if not is_block_diffusion(self):
                return original(self)
            # `Worker.__init__` reads this just before it looks for Triton, in a process where
            # nothing of ours ran before. Importing its module elsewhere would take time.
            worker: Any = sys.modules.get("vllm.v1.worker.gpu_worker")
            if worker is not None and needs_cpu_kernels():
                worker.HAS_TRITON = True
            return True

        return used

    def validate(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def checked(self: Any) -> None:
            if not (is_block_diffusion(self) and needs_cpu_kernels()):
                original(self)

        return checked

    patch(VllmConfig, "use_v2_model_runner", use_v2)
    patch(VllmConfig, "_validate_v2_model_runner", validate)


def enable_amx() -> None:
    """Have the kernel grant AMX to a worker of ours before its first operation.

    Symptom: on a CPU with AMX a bfloat16 model dies of SIGILL, with `--enforce-eager` at least.
    Upstream: `CPUWorker.init_device` (vllm/v1/worker/cpu_worker.py) does not ask for it; the place
    here is the wrapper's, which every executor calls in the worker's process.
    Remove when it asks. Without AMX, or off Linux, torch's function does nothing.
    """
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def init_device(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def initialized(self: Any) -> None:
            enable = getattr(torch.cpu, "_init_amx", None)
            if (
                enable is not None
                and current_platform.is_cpu()
                and is_block_diffusion(self.vllm_config)
            ):
                enable()
            original(self)

        return initialized

    patch(WorkerWrapperBase, "init_device", init_device)


def needs_cpu_kernels() -> bool:
    """Whether runner V2's small Triton kernels need our CPU stand-ins."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return current_platform.is_cpu() and not HAS_TRITON


def register_cpu_kernels() -> None:
    """Register numpy stand-ins for the kernels that runner V2 launches, once a process.

    Through vLLM's platform override (`vllm.triton_utils.dispatcher`). Called by our ModelState,
    that is in worker processes only and before the first launch.
    """
    if not needs_cpu_kernels():
        return
    from vllm.triton_utils import dispatcher, triton

    from vllm_nbdiff.engine import cpu_kernels, cpu_logprobs

    kernels = cpu_kernels.KERNELS | cpu_logprobs.KERNELS
    if kernels.keys() <= dispatcher._registry.keys():
        return
    dispatcher.register_kernels(kernels)
    # The placeholder for an absent Triton lacks this helper, which launchers call on the host.
    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()


def ignore_grammar_of_warm_up() -> None:
    """Leave out grammar bitmasks in a process that runs one of our models.

    Symptom: warm-up on a GPU fails an assertion, because it sends a bitmask for prompts, which have
    no rows of logits by the runner's count; of ours the last row of a prompt has. Our scheduler
    sends none: rows are masked in `engine/grammars.py`.
    Upstream: `warmup_kernels` (vllm/v1/worker/gpu/warmup.py).
    Remove when warm-up sends no bitmask to diffusion models.
    """
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    def ignore(original: Callable[..., None]) -> Callable[..., None]:
        def ignored(self: Any, *args: Any, **kwargs: Any) -> None:
            return None

        return ignored

    patch(StructuredOutputsWorker, "apply_grammar_bitmask", ignore)


def carry_counts() -> None:
    """Bring the counts of a `CountedOutput` to the scheduler, copied as sampled tokens are, and in
    which graph the forward ran.

    Called by our ModelState: only workers need it, and importing the runner takes time.

    Symptom: a model state has no field of its own in the worker's output; in `num_nans`, the one
    number for each request, counts would hide NaNs and pass for them.
    Upstream: `AsyncOutput` (vllm/v1/worker/gpu/async_utils.py).
    Order: `AsyncOutput.__init__` (vllm/v1/worker/gpu/async_utils.py): `copy_stream.wait_stream`,
    `copy_event.record`.
    Remove when a custom sampler's output may carry more to the scheduler.
    """
    from vllm.v1.worker.gpu.async_utils import AsyncOutput, async_copy_to_np, stream

    def copy(original: Callable[..., None]) -> Callable[..., None]:
        def init(
            self: Any, *, sampler_output: Any, main_stream: Any, copy_stream: Any, **kwargs: Any
        ) -> None:
            counts, self.nbdiff_counts = getattr(sampler_output, "counts", None), None
            self.nbdiff_graph = getattr(sampler_output, "graph", None)
            if counts is not None:
                # First, as the original ends with the event that all copies are waited for by.
                with stream(copy_stream, main_stream):
                    copy_stream.wait_stream(main_stream)
                    self.nbdiff_counts = async_copy_to_np(counts)
            kwargs |= {"main_stream": main_stream, "copy_stream": copy_stream}
            original(self, sampler_output=sampler_output, **kwargs)

        return init

    def attach(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_output(self: Any) -> Any:
            output = original(self)
            if self.nbdiff_counts is not None:
                counts = self.nbdiff_counts.tolist()
                output.nbdiff_counts = dict(zip(output.req_ids, counts, strict=True))
                output.nbdiff_graph = self.nbdiff_graph
            return output

        return get_output

    patch(AsyncOutput, "__init__", copy)
    patch(AsyncOutput, "get_output", attach)


def counts_of(model_runner_output: Any) -> dict[str, list[int]]:
    """The counts that `carry_counts` attached, by request; empty where nothing was computed."""
    return getattr(model_runner_output, "nbdiff_counts", {})


def graph_of(model_runner_output: Any) -> str | None:
    """What `carry_counts` attached beside them: which of `metrics.GRAPHS` the forward ran in."""
    return getattr(model_runner_output, "nbdiff_graph", None)


def write_more_kv(layers: Iterable[Any], write: Callable[..., None]) -> None:
    """Have attention `layers` of vLLM call `write` whenever they have written KV, with the function
    that writes it and what that was given, less the slots.

    Symptom: a forward writes the KV of a row to one slot.
    Upstream: `unified_kv_cache_update` (vllm/model_executor/layers/attention/attention.py).
    Remove when a slot mapping may name a row twice.
    """

    def writing(update: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(update)
        def wrote(layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
            update(layer, key, value, kv_cache, slot_mapping)
            write(update, layer, key, value, kv_cache)

        return wrote

    for layer in layers:
        layer.impl.do_kv_cache_update = writing(layer.impl.do_kv_cache_update)
