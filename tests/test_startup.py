# SPDX-License-Identifier: Apache-2.0
"""Defaults of a GPU platform, chosen without one."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

import vllm_nbdiff
from vllm_nbdiff import startup
from vllm_nbdiff.engine_options import EngineOptions
from vllm_nbdiff.names import ATTENTION_BACKEND


def start(
    monkeypatch: pytest.MonkeyPatch,
    backend: str | None,
    cpu: bool = False,
    graphs: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
    **options: Any,
) -> str:
    """The attention backend that start-up leaves selected."""
    vllm_nbdiff.register()
    monkeypatch.setattr(current_platform, "is_cpu", lambda: cpu)
    for name in ("_refuse_on_cpu", "_limit_cpu_kv_cache", "set_cpu_environment"):
        monkeypatch.setattr(startup, name, lambda *_: None)
    selected = None if backend is None else AttentionBackendEnum[backend]
    vllm_config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=selected),
        compilation_config=CompilationConfig(cudagraph_mode=graphs),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=1024),
    )
    engine = EngineOptions(**options)
    config: Any = SimpleNamespace(
        engine=engine,
        family=SimpleNamespace(block_causal=False),
        static_shapes=engine.static_shapes is not False,
        most_rows=32,
    )
    startup.set_platform_defaults(vllm_config, config)
    return getattr(vllm_config.attention_config.backend, "name", "none")


def test_ours_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(monkeypatch, None) == "CUSTOM"
    assert AttentionBackendEnum.CUSTOM.get_path() == ATTENTION_BACKEND
    assert start(monkeypatch, None, attention_kernel="torch") == "CUSTOM"


def test_an_explicit_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_ATTN", "FLASH_ATTN", "CUSTOM"):
        assert start(monkeypatch, name) == name


def test_what_cannot_be_honoured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--attention-backend FLASHINFER takes no causal flag"):
        start(monkeypatch, "FLASHINFER")
    with pytest.raises(ValueError, match=r"attention_kernel .* TRITON_ATTN is used"):
        start(monkeypatch, "TRITON_ATTN", attention_kernel="torch")
    with pytest.raises(ValueError, match=r"attention_kernel .* CPU_ATTN is used"):
        start(monkeypatch, None, cpu=True, attention_kernel="torch")


def test_a_gpu_has_static_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="static_shapes=false needs a CPU"):
        start(monkeypatch, None, static_shapes=False)
    with pytest.raises(ValueError, match=r"cudagraph_mode=FULL .* FULL_AND_PIECEWISE"):
        start(monkeypatch, None, graphs=CUDAGraphMode.FULL)
    assert start(monkeypatch, None, graphs=CUDAGraphMode.FULL_DECODE_ONLY) == "CUSTOM"


def test_another_plugins_attention_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_nbdiff.register()
    register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
    try:
        with pytest.raises(ValueError, match=r"another.plugin.Backend .* TRITON_ATTN"):
            start(monkeypatch, None)
    finally:
        register_backend(AttentionBackendEnum.CUSTOM, ATTENTION_BACKEND)
