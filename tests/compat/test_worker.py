# SPDX-License-Identifier: Apache-2.0
"""Patches about workers, and about their end.

A test named `test_..._is_needed` that fails means that the patch can go.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.utils import get_engine_process_shutdown_timeout
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.worker_base import WorkerWrapperBase

from tests.compat.conftest import stock
from vllm_nbdiff.names import ARCHITECTURE

only_on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="about the CPU platform")


@only_on_cpu
def test_v2_model_runner_only_for_our_models(served: VllmConfig) -> None:
    assert served.use_v2_model_runner
    assert not VllmConfig().use_v2_model_runner


@only_on_cpu
def test_v2_model_runner_patch_is_needed(served: VllmConfig) -> None:
    assert stock(VllmConfig, "use_v2_model_runner")(served) is False
    served._validate_v2_model_runner()
    if not hasattr(gpu_worker, "HAS_TRITON"):  # from vLLM 0.33 on the worker asks
        with pytest.raises(ValueError, match="requires Triton"):
            stock(VllmConfig, "_validate_v2_model_runner")(served)


@only_on_cpu
def test_a_worker_of_ours_needs_no_triton(
    served: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of vLLM 0.33 asks for it right after it has read which runner is used."""
    monkeypatch.setattr(gpu_worker, "HAS_TRITON", False, raising=False)
    assert not VllmConfig().use_v2_model_runner and not gpu_worker.HAS_TRITON
    assert served.use_v2_model_runner and gpu_worker.HAS_TRITON


def init_device(vllm_config: Any) -> list[str]:
    """What happens in a worker's process, in order."""
    happened: list[str] = []
    wrapper = WorkerWrapperBase()
    wrapper.vllm_config = vllm_config
    wrapper.worker = SimpleNamespace(init_device=lambda: happened.append("device"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_init_amx", lambda: happened.append("AMX"))
        wrapper.init_device()
    return happened


@only_on_cpu
def test_amx_is_asked_for_before_a_workers_first_operation(served: VllmConfig) -> None:
    assert init_device(served) == ["AMX", "device"]
    assert init_device(VllmConfig()) == ["device"]


@only_on_cpu
def test_amx_of_a_torch_that_cannot_ask(
    served: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = WorkerWrapperBase()
    wrapper.vllm_config, initialized = served, []
    wrapper.worker = SimpleNamespace(init_device=lambda: initialized.append(True))
    monkeypatch.delattr(torch.cpu, "_init_amx")
    wrapper.init_device()
    assert initialized == [True]


@pytest.mark.parametrize(
    ("architecture", "asked", "timeout"),
    [(ARCHITECTURE, None, 15), (ARCHITECTURE, "2.5", 2.5), ("Llama", None, 0)],
)
def test_time_to_abort_requests(
    architecture: str, asked: str | None, timeout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked is not None:
        monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", asked)
    given: list[float | None] = []
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(architectures=[architecture])),
        engine_core=SimpleNamespace(shutdown=lambda timeout: given.append(timeout)),
    )
    AsyncLLM.__dict__["shutdown"](engine, timeout=0)
    assert given == [timeout]


def test_shutdown_patch_is_needed() -> None:
    """By default vLLM gives the engine no time to abort its requests."""
    assert VllmConfig().shutdown_timeout == 0
    assert get_engine_process_shutdown_timeout(0, 0) == 0
