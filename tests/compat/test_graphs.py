# SPDX-License-Identifier: Apache-2.0
"""The patch about CUDA graphs.

A test named `test_..._is_needed` that fails means that the patch can go.
"""

import copy
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from tests.compat.conftest import stock
from vllm_nbdiff.compat import capture_any_decode
from vllm_nbdiff.graphs import capture_sizes

FULL = CUDAGraphMode.FULL


def manager(config: Any, patched: bool) -> Any:
    """With all graphs captured, of a server of 64 requests; without a device."""
    capture_any_decode()
    made: Any = CudaGraphManager.__new__(CudaGraphManager)
    made.vllm_config, made.compilation_config = config, config.compilation_config
    made.max_num_reqs, made.decode_query_len = 64, config.diffusion_config.canvas_length
    made.cudagraph_mode, made.varlen_decode = CUDAGraphMode.FULL_AND_PIECEWISE, False
    made.ubatch_runner, made.lora_capture_cases = None, [0]
    made._lora_dispatch_map, made._max_lora_case = {}, 0
    made._candidates, made._capture_descs = {}, {}
    made._graphs_captured = True
    init = CudaGraphManager._init_candidates
    (init if patched else stock(CudaGraphManager, "_init_candidates"))(made)
    return made


@pytest.fixture
def config(served: VllmConfig) -> Any:
    own: Any = copy.copy(served)
    own.attention_config = copy.copy(served.attention_config)
    own.attention_config.backend = AttentionBackendEnum.CUSTOM
    sizes = capture_sizes(2048)
    own.compilation_config = CompilationConfig(
        cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=2048
    )
    return own


# Requests, rows of all, rows of each if these are equal, most rows of one.
DECODES = [(1, 1, 1, 1), (3, 48, 16, 16), (2, 66, 33, 33), (5, 37, None, 32), (64, 64, 1, 1)]


def in_full_graphs(made: Any) -> list[int | None]:
    """Requests of the graph for each of `DECODES`; None: no full graph."""
    found = [made.dispatch(n, rows, uniform, 0, most) for n, rows, uniform, most in DECODES]
    return [desc.num_reqs if desc.cg_mode == FULL else None for desc in found]


def test_any_decode_has_a_full_graph(config: Any) -> None:
    """Of few requests where they have many rows each."""
    made = manager(config, True)
    assert in_full_graphs(made) == [1, 6, 10, 6, 64]
    # One with a prompt runs piecewise, and so does what is larger than any graph.
    assert made.dispatch(2, 40, None, 0, None).cg_mode == CUDAGraphMode.PIECEWISE
    assert made.dispatch(2, 4000, None, 0, 2000).cg_mode == CUDAGraphMode.NONE
    descs = made._capture_descs[FULL]
    assert len(descs) == len(set(descs)) < 3 * len(capture_sizes(2048))
    assert all(desc.num_reqs <= min(desc.num_tokens, 64) for desc in descs)


def test_graphs_of_any_decode_are_for_our_attention(config: Any) -> None:
    config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    assert in_full_graphs(manager(config, True)) == [None] * len(DECODES)


def test_patch_is_needed(config: Any) -> None:
    assert in_full_graphs(manager(config, False)) == [None] * len(DECODES)
