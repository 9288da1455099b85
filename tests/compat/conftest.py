# SPDX-License-Identifier: Apache-2.0
"""What tests of the patches share."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

import vllm_nbdiff
from tests.conftest import MASK
from vllm_nbdiff.names import ARCHITECTURE


@pytest.fixture(autouse=True)
def registered() -> None:
    vllm_nbdiff.register()


@pytest.fixture(scope="module")
def served(golden_checkpoint: Path) -> VllmConfig:
    """The configuration of an engine that serves one of our models."""
    vllm_nbdiff.register()
    overrides = {"architectures": [ARCHITECTURE], "mask_token_id": MASK, "block_length": 8}
    return EngineArgs(
        model=str(golden_checkpoint),
        hf_overrides=overrides,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
    ).create_engine_config()


def stock(owner: type | ModuleType, name: str) -> Any:
    """vLLM's own function."""
    attribute = owner.__dict__[name]
    return (attribute.fget if isinstance(attribute, property) else attribute).__wrapped__
