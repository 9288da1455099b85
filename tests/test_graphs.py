# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs capture, decided without a GPU."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import envs
from vllm.config.compilation import CompilationConfig, CUDAGraphMode

from vllm_nbdiff import startup
from vllm_nbdiff.engine.lookahead import canvas_tokens
from vllm_nbdiff.families.family import FAMILIES, NEMOTRON, Family
from vllm_nbdiff.graphs import capture_sizes, refuse_graphs, set_capture_sizes
from vllm_nbdiff.request_options import RequestOptions

L = 32


def start_with(copies_kv: bool = True, **compilation: Any) -> None:
    config = SimpleNamespace(compilation_config=CompilationConfig(**compilation))
    refuse_graphs(config, copies_kv)


def test_what_a_graph_must_not_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of KV are other ones in every forward; between the pieces of a graph they are made."""
    start_with()
    start_with(splitting_ops=[*CompilationConfig._attention_ops, "vllm::unified_kv_cache_update",
                              "vllm::unified_mla_kv_cache_update"])  # fmt: skip
    with pytest.raises(ValueError, match="cudagraph_mode=FULL captures one segment"):
        start_with(cudagraph_mode=CUDAGraphMode.FULL)
    with pytest.raises(ValueError, match="use_inductor_graph_partition=true captures KV writes"):
        start_with(use_inductor_graph_partition=True)
    with pytest.raises(ValueError, match="splitting_ops without vllm::unified_kv_cache_update"):
        start_with(splitting_ops=["vllm::unified_attention_with_output"])
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    envs.disable_envs_cache()
    with pytest.raises(ValueError, match="VLLM_USE_BREAKABLE_CUDAGRAPH=1 captures KV writes"):
        start_with()
    start_with(copies_kv=False, use_inductor_graph_partition=True)
    # Full graphs make the copies of the step that replays them.
    start_with(cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY, use_inductor_graph_partition=True)
    start_with(cudagraph_mode=CUDAGraphMode.NONE)


@pytest.mark.parametrize("most", [1, 7, 16, 33, 512, 4096, 4224])
def test_sizes(most: int) -> None:
    sizes = capture_sizes(most)
    assert sizes[-1] == most and sizes == sorted(set(sizes)) and len(sizes) <= 56
    for below, size in itertools.pairwise(sizes):
        assert size - below <= max(16, size / 8)


def served(family: Family, budget: int, **compilation: Any) -> Any:
    """What start-up leaves of a configuration, for a GPU."""
    scheduler = SimpleNamespace(
        max_num_batched_tokens=budget, max_num_scheduled_tokens=None, max_num_seqs=1024,
        long_prefill_token_threshold=0,
    )  # fmt: skip
    rows = L + family.known_rows
    startup._fit_blocks(scheduler, L, rows)  # type: ignore[arg-type]
    config = SimpleNamespace(
        scheduler_config=scheduler, compilation_config=CompilationConfig(**compilation)
    )
    set_capture_sizes(config, rows)
    return config


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("budget", [L + 1, 1056, 8192])
def test_every_sequence_has_room_and_a_graph(family: Family, budget: int) -> None:
    """For the least that a schedule gives the widest canvas, however it is decoded."""
    modes = [mode for mode in family.modes if mode != "auto"]
    requests = [RequestOptions(mode=mode, block_length=L, small_blocks=1) for mode in modes]
    if "verify" in modes:
        requests.append(RequestOptions(mode="verify", draft_length=L, fan_out=2, block_length=L))
    worker: Any = SimpleNamespace(static_shapes=True, block_length=L, family=family)
    most = max(canvas_tokens(request, worker, limit=budget).least for request in requests)
    assert most == L + (family is NEMOTRON)
    config = served(family, budget)
    seqs = config.scheduler_config.max_num_seqs
    assert seqs == budget // most
    assert config.compilation_config.cudagraph_capture_sizes[-1] == min(128, seqs) * most


def test_sizes_that_the_user_names_are_kept() -> None:
    sizes = served(NEMOTRON, 8192, cudagraph_capture_sizes=[32, 64]).compilation_config
    assert sizes.cudagraph_capture_sizes == [32, 64]
    sizes = served(NEMOTRON, 8192, max_cudagraph_capture_size=64).compilation_config
    assert sizes.cudagraph_capture_sizes is None
