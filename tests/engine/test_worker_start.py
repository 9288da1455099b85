# SPDX-License-Identifier: Apache-2.0
"""What happens in the process that runs the model before its first operation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform


@pytest.mark.skipif(not current_platform.is_cpu(), reason="about the CPU platform")
def test_amx_is_asked_for_once_before_the_model_is_loaded(
    golden_checkpoint: Path, make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice would mean that vLLM asks as well, and that the patch can go."""
    happened: list[str] = []
    load_model = BaseModelLoader.load_model

    def load(self: BaseModelLoader, *args: Any, **kwargs: Any) -> Any:
        happened.append("load")
        return load_model(self, *args, **kwargs)

    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: happened.append("AMX"))
    monkeypatch.setattr(BaseModelLoader, "load_model", load)
    make_llm(golden_checkpoint)
    assert happened == ["AMX", "load"]
