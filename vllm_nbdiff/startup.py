# SPDX-License-Identifier: Apache-2.0
"""Start-up: options that are refused with block diffusion, and defaults of the platform."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from vllm_nbdiff.compat import ATTENTION_BACKEND

if TYPE_CHECKING:
    from vllm_nbdiff.config import BlockDiffusionConfig

# FLASH_ATTN takes a causal flag per sequence in its version 4, and says so otherwise.
_CUDA_ATTENTION = ("CUSTOM", "TRITON_ATTN", "FLASH_ATTN")


def refuse_unsupported_features(vllm_config: Any) -> None:
    """Raise ValueError naming the flag of the first start-up option we do not honour."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    reasons = {
        "--runner pooling": model.runner_type != "generate",
        "--speculative-config": vllm_config.speculative_config is not None,
        "--enable-lora": vllm_config.lora_config is not None,
        "--enable-dbo": bool(parallel.enable_dbo),
        "--logits-processors": bool(model.logits_processors),
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size above 1": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size above 1": parallel.prefill_context_parallel_size > 1,
        "--enable-batch-sharded-sampling": bool(parallel.enable_batch_sharded_sampling),
        "--enable-trace-replay": model.enable_trace_replay,
        "--return-sampling-mask": model.return_sampling_mask,
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
    }
    for flag, used in reasons.items():
        if used:
            raise ValueError(f"{flag} is not supported with block-diffusion models")


def set_platform_defaults(vllm_config: Any, config: BlockDiffusionConfig) -> None:
    """Choose defaults that the platform's own would get wrong for block diffusion.

    Raises ValueError where an option does not apply to the platform.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if current_platform.is_cpu():
        _keep_float32_on_cpu(vllm_config)
        _limit_cpu_kv_cache(vllm_config)
        _preload_intel_openmp()
        backend = AttentionBackendEnum.CPU_ATTN
        _check_interpreter(config)
    else:
        _select_cuda_attention(vllm_config)
        backend = vllm_config.attention_config.backend
    if config.engine.attention_kernel is not None and backend.get_path() != ATTENTION_BACKEND:
        raise ValueError(
            "--additional-config: nbdiff.attention_kernel is an option of the plugin's own "
            f"attention, and {backend.name} is used"
        )


def _check_interpreter(config: BlockDiffusionConfig) -> None:
    """Kernels run on a CPU in Triton's interpreter only, which is for tests."""
    if config.decoder != "device":
        return
    interprets = False
    if importlib.util.find_spec("triton") is not None:
        import triton

        interprets = triton.knobs.runtime.interpret
    if not interprets:
        raise ValueError(
            "--additional-config: nbdiff.decoder=device needs a GPU, or for tests triton with "
            "TRITON_INTERPRET=1"
        )


def _keep_float32_on_cpu(vllm_config: Any) -> None:
    """Serve a float32 checkpoint in float32 on a CPU that does not compute in bfloat16.

    vLLM's `--dtype auto` turns float32 into bfloat16; without AVX-512 that is several times slower,
    more so for blocks than for single tokens.
    """
    import torch
    from vllm.logger import init_logger

    model = vllm_config.model_config
    stored = getattr(model.hf_config, "dtype", None)
    if (
        model.dtype == torch.bfloat16
        and stored in (torch.float32, "float32")
        and not torch.cpu._is_avx512_bf16_supported()
    ):
        init_logger("vllm.nbdiff").warning(
            "Serving the float32 checkpoint in float32, not bfloat16: this CPU has no bfloat16 "
            "arithmetic"
        )
        model.dtype = torch.float32


def _limit_cpu_kv_cache(vllm_config: Any) -> None:
    """Give the KV cache a bounded share of free memory unless the user sized it.

    vLLM's default claims 92 % of all host memory and refuses to start when it is not free.
    """
    from vllm.utils.cpu_resource_utils import get_memory_node_info

    cache, model = vllm_config.cache_config, vllm_config.model_config
    default = type(cache)().gpu_memory_utilization
    if (
        cache.kv_cache_memory_bytes is not None
        or cache.gpu_memory_utilization != default
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    ):
        return
    parallel = vllm_config.parallel_config
    token_bytes = (
        2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size()
        * model.dtype.itemsize
    )
    one_sequence = token_bytes * (model.max_model_len + 256)
    share = get_memory_node_info().available_memory // (4 * parallel.tensor_parallel_size)
    cache.kv_cache_memory_bytes = max(one_sequence, min(4 << 30, share))


def _preload_intel_openmp() -> None:
    """Have the workers run on Intel's OpenMP runtime, which the CPU wheel brings along.

    vLLM preloads torch's libgomp unless an OpenMP runtime is preloaded already; Intel's is faster
    and vLLM's documentation recommends it.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    library = os.path.join(sys.prefix, "lib", "libiomp5.so")
    if os.path.exists(library) and not re.search("libi?omp|libgomp", preloaded):
        os.environ["LD_PRELOAD"] = f"{preloaded}:{library}" if preloaded else library


def _select_cuda_attention(vllm_config: Any) -> None:
    """Select attention that takes a causal flag per sequence: ours unless the user names one."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention, custom = vllm_config.attention_config, AttentionBackendEnum.CUSTOM
    if attention.backend is None:
        if custom.get_path() != ATTENTION_BACKEND:
            raise ValueError(
                f"another plugin registered {custom.get_path()} as attention backend CUSTOM; use "
                "--attention-backend TRITON_ATTN"
            )
        attention.backend = custom
    elif attention.backend.name not in _CUDA_ATTENTION:
        raise ValueError(
            f"--attention-backend {attention.backend.name} takes no causal flag per sequence; "
            f"use one of {', '.join(_CUDA_ATTENTION)}"
        )
