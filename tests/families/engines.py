# SPDX-License-Identifier: Apache-2.0
"""Engines on checkpoints as they are released: nothing but their own config.json."""

from pathlib import Path
from typing import Any

from tests.conftest import in_process


def serve(checkpoint: Path, **settings: Any) -> Any:
    """An engine in this process, told nothing about the checkpoint."""
    from vllm import LLM

    settings = {
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "disable_log_stats": False,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 26,
    } | settings
    with in_process():
        return LLM(model=str(checkpoint), dtype="float32", **settings)
