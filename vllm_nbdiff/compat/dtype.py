# SPDX-License-Identifier: Apache-2.0
"""What `--dtype auto` means on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_nbdiff.compat.patching import patch
from vllm_nbdiff.families.family import family_of
from vllm_nbdiff.names import LOGGER


def keep_float32_on_cpu() -> None:
    """Serve a float32 checkpoint of ours in float32 where a CPU does not compute in bfloat16.

    Symptom: `--dtype auto` turns float32 into bfloat16; without AVX-512 that is several times
    slower, more so for blocks than for single tokens. Once it is resolved, nothing tells it from
    `--dtype bfloat16`, which is honoured.
    Upstream: `_get_and_verify_dtype` (vllm/config/model.py).
    Remove when `auto` asks what a CPU computes in.
    """
    from vllm.config import model

    def kept(original: Callable[..., Any]) -> Callable[..., Any]:
        def resolve(model_id: str, config: Any, dtype: Any, **options: Any) -> Any:
            found = original(model_id, config, dtype, **options)
            return _without_bfloat16(config, found) if dtype == "auto" else found

        return resolve

    patch(model, "_get_and_verify_dtype", kept)


def _without_bfloat16(config: Any, found: Any) -> Any:
    """The dtype of a checkpoint for which `auto` has `found` one."""
    import torch
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    if (
        found != torch.bfloat16
        or getattr(config, "dtype", None) not in (torch.float32, "float32")
        or family_of(getattr(config, "architectures", None)) is None
        or not current_platform.is_cpu()
        or torch.cpu._is_avx512_bf16_supported()
    ):
        return found
    init_logger(LOGGER).info(
        "Serving the float32 checkpoint in float32, not bfloat16: this CPU has no bfloat16 "
        "arithmetic"
    )
    return torch.float32
