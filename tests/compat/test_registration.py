# SPDX-License-Identifier: Apache-2.0
"""What `register` does to vLLM, all of it or nothing, and what vLLM still needs.

A test named `test_..._is_needed` that fails means that the patch can go.
"""

import logging

import pytest
import vllm
from vllm import ModelRegistry
from vllm.config import ReasoningConfig, VllmConfig
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger
from vllm.v1.worker.worker_base import WorkerWrapperBase

import vllm_nbdiff
from tests.compat.conftest import stock
from vllm_nbdiff import compat
from vllm_nbdiff.compat.patching import MARK
from vllm_nbdiff.families.configs import CONFIGS
from vllm_nbdiff.families.family import FAMILIES
from vllm_nbdiff.names import ARCHITECTURE, LOGGER
from vllm_nbdiff.versions import unsupported_vllm

PATCHED = [
    (InputProcessor, "process_inputs"),
    (PrometheusStatLogger, "__init__"),
    (LoggingStatLogger, "__init__"),
    (VllmConfig, "_validate_v2_model_runner"),
    (AsyncLLM, "__init__"),
    (AsyncLLM, "generate"),
    (AsyncLLM, "shutdown"),
    (WorkerWrapperBase, "init_device"),
]


def test_register_is_idempotent() -> None:
    before = [owner.__dict__[name] for owner, name in PATCHED]
    vllm_nbdiff.register()
    assert [owner.__dict__[name] for owner, name in PATCHED] == before
    for owner, name in PATCHED:
        assert not getattr(stock(owner, name), MARK, False)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "unknown"])
def test_an_unsupported_vllm_is_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of warning; vLLM serves other models as without the plugin."""
    touched: list[str] = []
    said: list[str] = []
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(compat, "apply_patches", lambda: touched.append("patches"))
    monkeypatch.setattr(compat, "register_config_hook", lambda *_: touched.append("hook"))
    monkeypatch.delitem(ModelRegistry.models, ARCHITECTURE)
    # The logger's own state is that of all tests that ran before.
    monkeypatch.setattr(logging.getLogger(LOGGER), "warning", said.append)
    vllm_nbdiff.register()
    assert ARCHITECTURE not in ModelRegistry.models and touched == []
    (line,) = said
    assert "\n" not in line and f"supports vLLM 0.32 and 0.33, found {version}" in line


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc1"])
def test_supported_vllm(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    assert unsupported_vllm() is None


def test_configs_are_needed() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert not {config.model_type for config in CONFIGS}.intersection(CONFIG_MAPPING_NAMES)


def test_vllm_serves_none_of_our_architectures() -> None:
    """One that it serves itself would be its own class with our scheduler."""
    from vllm.model_executor.models.registry import _VLLM_MODELS

    assert not {name for family in FAMILIES for name in family.models}.intersection(_VLLM_MODELS)


def test_a_reasoning_config_of_token_ids_is_needed() -> None:
    """vLLM's own cannot be given any."""
    config = compat.reasoning_config(7)
    config.initialize_token_ids(None)
    assert config.enabled and config.reasoning_end_token_ids == [7]
    with pytest.raises((TypeError, ValueError)):
        ReasoningConfig(reasoning_end_token_ids=[7])
