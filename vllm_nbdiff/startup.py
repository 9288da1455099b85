# SPDX-License-Identifier: Apache-2.0
"""Start-up: options that are refused with block diffusion, and defaults of the platform."""

from __future__ import annotations

import math
import os
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.decoding.rules import refuse_rules_that_read
from vllm_nbdiff.environment import set_cpu_environment
from vllm_nbdiff.graphs import refuse_graphs, set_capture_sizes
from vllm_nbdiff.names import ATTENTION_BACKEND, LOGGER, SCHEDULER

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SchedulerConfig, VllmConfig

# FLASH_ATTN takes a causal flag per sequence in its version 4, and says so otherwise.
_CUDA_ATTENTION = ("CUSTOM", "TRITON_ATTN", "FLASH_ATTN")
# vLLM's own choice (vllm/platforms/cpu.py).
_CPU_PAGE_SIZE = 128
# vLLM applies every one that is installed, to every model.
_LOGITS_PROCESSORS = "vllm.logits_processors"


class NBDiffConfigHook:
    """vLLM's per-architecture config hook (`MODELS_CONFIG_MAP`)."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Nothing to change before the other configs exist."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the block-diffusion settings and set what the engine needs.

        `canvas_length` goes on `DiffusionConfig` only: on the HF config it would make vLLM treat
        the model as one that refuses temperature, seed and most other sampling parameters.

        Order: `VllmConfig.__post_init__` (vllm/config/vllm.py):
        `self.try_verify_and_update_config`, `scheduler_config.async_scheduling`,
        `self._set_cudagraph_sizes`, `current_platform.check_and_update_config`,
        `self._validate_v2_model_runner`.
        """
        from vllm.config.diffusion import DiffusionConfig

        config = BlockDiffusionConfig.from_vllm_config(vllm_config)
        refuse_unsupported_features(vllm_config)
        if config.static_shapes:
            refuse_rules_that_read(config.block_length)
        if config.family.thinking_budget:
            _set_end_of_thinking(vllm_config, config.vocab_size)
        canvas = vllm_config.diffusion_config
        vllm_config.diffusion_config = DiffusionConfig(
            canvas_length=config.block_length,
            max_denoising_steps=canvas.max_denoising_steps if canvas is not None else None,
        )
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        _fit_blocks(vllm_config.scheduler_config, config.block_length, config.most_rows)
        if config.family.block_causal:
            _fit_pages(vllm_config, config.block_length)
        set_platform_defaults(vllm_config, config)


def _set_end_of_thinking(vllm_config: VllmConfig, vocab_size: int) -> None:
    """Let `end_think_token_id` of config.json stand for a reasoning config, which vLLM asks for."""
    from vllm_nbdiff import compat

    token = getattr(vllm_config.model_config.hf_config, "end_think_token_id", None)
    if token is None or vllm_config.reasoning_config is not None:
        return
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
        raise ValueError(
            f"end_think_token_id must be an integer in [0, {vocab_size}) (the vocabulary), "
            f"got {token!r}"
        )
    vllm_config.reasoning_config = compat.reasoning_config(token)


def _fit_blocks(scheduler: SchedulerConfig, block_length: int, rows: int) -> None:
    """Make sure that a step can hold a whole block of every sequence, which is `rows` tokens of a
    schedule; lowers `max_num_seqs`."""
    from vllm.logger import init_logger

    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        most = getattr(scheduler, name)
        if most is not None and most < block_length:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} ({most}) must hold one whole block (block_length={block_length})"
            )
    if 0 < scheduler.long_prefill_token_threshold < block_length:
        raise ValueError(
            f"--long-prefill-token-threshold ({scheduler.long_prefill_token_threshold}) would "
            f"split blocks: it must be 0 or at least block_length={block_length}"
        )
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    fits = max(budget // rows, 1)
    if scheduler.max_num_seqs > fits:
        init_logger(LOGGER).info(
            "max_num_seqs lowered from %d to %d: max_num_batched_tokens (%d) must hold a whole "
            "block, %d tokens, for every sequence",
            scheduler.max_num_seqs,
            fits,
            scheduler.max_num_batched_tokens,
            rows,
        )
        scheduler.max_num_seqs = fits


def _fit_pages(vllm_config: VllmConfig, block_length: int) -> None:
    """Make sure that pages hold whole blocks: a page that holds half of one is not final when it is
    full, and must not be shared."""
    from vllm.platforms import current_platform

    cache = vllm_config.cache_config
    if cache.user_specified_block_size:
        if cache.block_size % block_length:
            raise ValueError(
                f"--block-size ({cache.block_size}) must be a multiple of the block length "
                f"({block_length}): pages hold whole blocks where these see all of themselves"
            )
        return
    default = _CPU_PAGE_SIZE if current_platform.is_cpu() else cache.DEFAULT_BLOCK_SIZE
    cache.block_size = math.lcm(default, block_length)
    cache.user_specified_block_size = True


def refuse_unsupported_features(vllm_config: Any) -> None:
    """Raise ValueError naming the flag of the first start-up option we do not honour."""
    from vllm import envs

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    reasons = {
        "--runner pooling": model.runner_type != "generate",
        "--speculative-config": vllm_config.speculative_config is not None,
        "--enable-dbo": bool(parallel.enable_dbo),
        "--logits-processors": bool(model.logits_processors),
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size above 1": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size above 1": parallel.prefill_context_parallel_size > 1,
        "--enable-batch-sharded-sampling": bool(parallel.enable_batch_sharded_sampling),
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--enable-trace-replay": model.enable_trace_replay,
        "--return-sampling-mask": model.return_sampling_mask,
        # Kept for each row of a forward: a canvas has many of them for one token.
        "--enable-return-routed-experts": vllm_config.aux_output_config.enabled,
        "--watermark-config": vllm_config.watermark_config is not None,
        # It admits requests by itself, without our checks.
        "VLLM_USE_RUST_FRONTEND": envs.VLLM_USE_RUST_FRONTEND,
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        # Connectors keep and send the pages of tokens that are scheduled: those of canvases are not
        # final.
        "--kv-offloading-size": vllm_config.cache_config.kv_offloading_size is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
    }
    for flag, used in reasons.items():
        if used:
            raise ValueError(f"{flag} is not supported with block-diffusion models")
    # The hook may run again on a configuration that it has set up.
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        raise ValueError(
            "--scheduler-cls is not supported with block-diffusion models, which bring their own"
        )
    if installed := metadata.entry_points(group=_LOGITS_PROCESSORS):
        names = ", ".join(f"{entry.name} = {entry.value}" for entry in installed)
        raise ValueError(
            f"logits processors are not supported with block-diffusion models, and these are "
            f"installed (entry points {_LOGITS_PROCESSORS}): {names}; uninstall their packages"
        )


def set_platform_defaults(vllm_config: Any, config: BlockDiffusionConfig) -> None:
    """Choose defaults that the platform's own would get wrong for block diffusion.

    Raises ValueError where an option does not apply to the platform.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if current_platform.is_cpu():
        _refuse_on_cpu(vllm_config)
        _limit_cpu_kv_cache(vllm_config)
        set_cpu_environment()
        backend = AttentionBackendEnum.CPU_ATTN
    else:
        _refuse_on_cuda(vllm_config, config)
        set_capture_sizes(vllm_config, config.most_rows)
        _select_cuda_attention(vllm_config)
        backend = vllm_config.attention_config.backend
    if config.engine.attention_kernel is not None and backend.get_path() != ATTENTION_BACKEND:
        raise ValueError(
            "--additional-config: nbdiff.attention_kernel is an option of the plugin's own "
            f"attention, and {backend.name} is used"
        )


def _refuse_on_cpu(vllm_config: Any) -> None:
    """Raise ValueError for what vLLM has no CPU operations for."""
    if vllm_config.lora_config is not None and vllm_config.model_config.is_moe:
        raise ValueError(
            "--enable-lora is not supported on a CPU with a model that has experts: vLLM's LoRA "
            "layers of experts need a GPU"
        )


def _refuse_on_cuda(vllm_config: Any, config: BlockDiffusionConfig) -> None:
    """Raise ValueError for what a forward with a GPU's shapes cannot do."""
    if not config.static_shapes:
        raise ValueError("--additional-config: nbdiff.static_shapes=false needs a CPU")
    refuse_graphs(vllm_config, copies_kv=not config.family.block_causal)


def _limit_cpu_kv_cache(vllm_config: Any) -> None:
    """Give the KV cache a bounded share of free memory unless the user sized it.

    vLLM's default claims 92 % of all host memory and refuses to start when it is not free. What is
    claimed is zeroed, which takes seconds, so it is no more than all sequences of a server need,
    or a few dozen: beside fewer the rest keeps prefixes.
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
    # Its last page may hold one token, and one page is vLLM's own.
    page_size = max(cache.block_size or 0, _CPU_PAGE_SIZE)
    one_sequence = token_bytes * (model.max_model_len + 2 * page_size)
    share = get_memory_node_info().available_memory // (4 * parallel.tensor_parallel_size)
    sequences = max(vllm_config.scheduler_config.max_num_seqs, 32)
    most = min(4 << 30, share, sequences * one_sequence)
    cache.kv_cache_memory_bytes = max(one_sequence, most)


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
