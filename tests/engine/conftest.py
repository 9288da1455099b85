# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints of every backbone, with the same weights for transformers."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from tests.interpreter import interpret_kernels
from vllm_nbdiff.compat import ATTENTION_BACKEND
from vllm_nbdiff.engine.scheduler import NBDiffAsyncScheduler


@pytest.fixture(scope="session")
def make_async_llm(make_llm: Callable[..., Any]) -> Callable[..., Any]:
    """`make_llm` with two batches in flight; vLLM turns asynchronous scheduling off on CPU."""

    def make(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as monkeypatch:
            original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

            def check(cls: Any, vllm_config: Any) -> None:
                original(cls, vllm_config)
                vllm_config.scheduler_config.async_scheduling = True

            monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check))
            llm = make_llm(*args, **kwargs)
        core = llm.llm_engine.engine_core.engine_core
        assert isinstance(core.scheduler, NBDiffAsyncScheduler)
        assert core.batch_queue is not None
        return llm

    return make


@contextlib.contextmanager
def plugins_attention() -> Iterator[None]:
    """The plugin's attention on CPU, whose platform asks for `CPU_ATTN` whatever is selected; keys
    are cut as on a GPU of 8 processors, those of short texts too."""
    interpret_kernels()
    from vllm_nbdiff.kernels import attention_launch

    # vLLM remembers which backend it gave to which configuration.
    register_backend(AttentionBackendEnum.CPU_ATTN, ATTENTION_BACKEND)
    _cached_get_attn_backend.cache_clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        limits_of = attention_launch.limits_of
        monkeypatch.setattr(attention_launch, "multiprocessor_count", lambda device: 8)
        monkeypatch.setattr(
            attention_launch, "limits_of", lambda *of: limits_of(*of)._replace(part_cost=0)
        )
        yield
    AttentionBackendEnum.CPU_ATTN.clear_override()
    _cached_get_attn_backend.cache_clear()


@pytest.fixture
def own_attention() -> Iterator[None]:
    """It, for one test."""
    with plugins_attention():
        yield


CONFIGS: dict[str, type] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "PanguEmbedded": LlamaConfig,  # Llama with biases on q, k, v and o
}


@pytest.fixture(scope="session")
def make_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """`make_checkpoint(model_type, vocab_size)`: a folder to serve and the model as oracle."""

    def make(
        model_type: str, vocab_size: int = 160, seed: int = 0, std: float = 0.25, **keys: Any
    ) -> tuple[Path, PreTrainedModel]:
        biased = {"attention_bias": True} if model_type == "PanguEmbedded" else {}
        config = CONFIGS[model_type](
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            initializer_range=std,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=vocab_size - 2,
            **biased,
            **keys,
        )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        model = model.float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=std)
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder)
        if model_type == "PanguEmbedded":
            _as_pangu(folder / "config.json")
        return folder, model

    return make


def _as_pangu(path: Path) -> None:
    """The config as openPangu-Embedded-7B writes it, remote code included."""
    config = json.loads(path.read_text())
    config.pop("attention_bias")
    config |= {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
            "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
        },
        "bias": True,
        "model_type": "PanguEmbedded",
        "rope_theta": config.pop("rope_parameters")["rope_theta"],
    }
    path.write_text(json.dumps(config))
