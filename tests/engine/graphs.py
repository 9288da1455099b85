# SPDX-License-Identifier: Apache-2.0
"""Full CUDA graphs rehearsed on a CPU: what a capture runs is kept, and run again as it was."""

from __future__ import annotations

from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

from vllm_nbdiff.graphs import capture_sizes


class _Kept(CudaGraphManager):
    """In place of a device's graphs: a replay has the tensors of the capture, at the same
    addresses, and whatever the host knew then."""

    def capture(self, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            self.graphs[desc] = create_forward_fn(desc, warmup=False)
        self._graphs_captured = True

    def run_fullgraph(self, desc: Any) -> None:
        replay: Any = self.graphs[desc]
        replay(CUDAGraphMode.NONE)


class Rehearsal(ModelCudaGraphManager, _Kept):
    """vLLM's graphs of a model."""

    def __init__(self, runner: Any, most: int) -> None:
        config = runner.vllm_config
        config.attention_config.backend = AttentionBackendEnum.CPU_ATTN  # overridden by ours
        config.compilation_config.cudagraph_capture_sizes = capture_sizes(most)
        config.compilation_config.max_cudagraph_capture_size = most
        # What a mode makes besides, a pool of memory, is a device's.
        super().__init__(config, runner.device, CUDAGraphMode.NONE, runner.decode_query_len)
        self.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        self._init_candidates()
        self.steps: list[tuple[bool, Any]] = []
        """Whether all requests of a step decode, and what it ran in."""

    def dispatch(self, *args: Any, max_query_len: int | None = None, **kwargs: Any) -> Any:
        desc = super().dispatch(*args, max_query_len=max_query_len, **kwargs)
        self.steps.append((max_query_len is not None, desc))
        return desc


def rehearse(llm: Any, most: int) -> Rehearsal:
    """Have an engine capture, and replay, graphs of decodes up to `most` tokens."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    runner.cudagraph_manager = manager = Rehearsal(runner, most)
    runner.model_state.initialize_kv_cache(runner.kv_cache_config, runner.block_tables)
    parts = runner.block_tables, runner.attn_groups, runner.kv_cache_config
    manager.capture(runner.model, runner.model_state, runner.input_buffers, None, *parts)
    return manager
