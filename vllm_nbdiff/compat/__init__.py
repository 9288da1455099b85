# SPDX-License-Identifier: Apache-2.0
"""Every contact with vLLM's private parts, by the process that needs it.

Each patch is idempotent and says its symptom, where upstream decides it, and when it can go;
`tests/compat` turns red when one is no longer needed.
"""

from __future__ import annotations

from vllm_nbdiff.compat.bodies import cure_request_models
from vllm_nbdiff.compat.dtype import keep_float32_on_cpu
from vllm_nbdiff.compat.front_end import (
    abort_requests_at_shutdown,
    name_grammars,
    validate_at_admission,
    validate_before_streaming,
)
from vllm_nbdiff.compat.grammars import GrammarCompiler, name_for_workers, share_compiler
from vllm_nbdiff.compat.graphs import capture_any_decode, uses_own_attention
from vllm_nbdiff.compat.lora import (
    draft_only_ids,
    map_rows_of_adapters,
    note_draft_only_adapters,
    take_adapters_from,
)
from vllm_nbdiff.compat.metrics import KINDS, add_counts, export_diffusion_metrics
from vllm_nbdiff.compat.scheduler import allocate_own_lookahead, leave_ends_uncached
from vllm_nbdiff.compat.step_map import give_step_maps, pack_steps
from vllm_nbdiff.compat.thinking import (
    Thoughts,
    begins_by_thinking,
    reasoning_config,
    thoughts_of,
)
from vllm_nbdiff.compat.worker import (
    carry_counts,
    counts_of,
    enable_amx,
    graph_of,
    ignore_grammar_of_warm_up,
    needs_cpu_kernels,
    register_cpu_kernels,
    select_v2_model_runner,
    write_more_kv,
)
from vllm_nbdiff.names import ATTENTION_BACKEND

__all__ = [
    "ATTENTION_BACKEND",
    "KINDS",
    "GrammarCompiler",
    "Thoughts",
    "add_counts",
    "allocate_own_lookahead",
    "apply_patches",
    "begins_by_thinking",
    "capture_any_decode",
    "carry_counts",
    "counts_of",
    "draft_only_ids",
    "graph_of",
    "ignore_grammar_of_warm_up",
    "leave_ends_uncached",
    "map_rows_of_adapters",
    "name_for_workers",
    "needs_cpu_kernels",
    "note_draft_only_adapters",
    "pack_steps",
    "reasoning_config",
    "register_config_hook",
    "register_cpu_kernels",
    "share_compiler",
    "take_adapters_from",
    "thoughts_of",
    "uses_own_attention",
    "write_more_kv",
]


def register_config_hook(architecture: str, hook: type) -> None:
    """Add `hook` to the table of per-architecture config hooks.

    The table is not documented as an extension point; vLLM's bart plugin uses it as one.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP[architecture] = hook


def apply_patches() -> None:
    """Apply every patch that all processes need."""
    select_v2_model_runner()
    validate_at_admission()
    validate_before_streaming()
    name_grammars()
    cure_request_models()
    keep_float32_on_cpu()
    abort_requests_at_shutdown()
    export_diffusion_metrics()
    give_step_maps()
    enable_amx()
