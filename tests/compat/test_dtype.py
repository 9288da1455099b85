# SPDX-License-Identifier: Apache-2.0
"""The type of a float32 checkpoint on a CPU.

A test named `test_..._is_needed` that fails means that the patch can go.
"""

from pathlib import Path

import pytest
import torch
from vllm.config import model
from vllm.engine.arg_utils import EngineArgs

from tests.compat.conftest import stock
from tests.conftest import MASK
from vllm_nbdiff.names import ARCHITECTURE


@pytest.fixture(params=[False, True], ids=["without bfloat16", "with bfloat16"])
def has_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return request.param


def served_as(checkpoint: Path, dtype: str, architecture: str = ARCHITECTURE) -> torch.dtype:
    overrides = {"architectures": [architecture], "mask_token_id": MASK, "block_length": 8}
    return (
        EngineArgs(
            model=str(checkpoint), hf_overrides=overrides, skip_tokenizer_init=True, dtype=dtype,
            max_model_len=512,
        )
        .create_model_config()
        .dtype
    )  # fmt: skip


def test_float32_of_auto_is_needed(
    golden_checkpoint: Path, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of our models; what is asked for by name is honoured."""
    expected = torch.bfloat16 if has_bfloat16 else torch.float32
    assert served_as(golden_checkpoint, "auto") == expected
    assert served_as(golden_checkpoint, "auto", "LlamaForCausalLM") == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert served_as(golden_checkpoint, str(dtype).removeprefix("torch.")) == dtype
    monkeypatch.setattr(model, "_get_and_verify_dtype", stock(model, "_get_and_verify_dtype"))
    assert served_as(golden_checkpoint, "auto") == torch.bfloat16
