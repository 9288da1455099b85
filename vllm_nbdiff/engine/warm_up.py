# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled before the first request, in every variant that a request may ask for.

Triton compiles a kernel anew for other constants and types, and for numbers and addresses that 16
divides or does not. Which of them a forward asks for depends on who is in the batch; compiled then,
it would hold up every request for seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size

from vllm_nbdiff.decoding.draws import compile_kernels, has_kernels
from vllm_nbdiff.engine.attention import SegmentAttentionImpl
from vllm_nbdiff.kernels.attention_launch import attention_launch
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.segment_table import SegmentTable
from vllm_nbdiff.kernels.write_kv import write_kv
from vllm_nbdiff.names import LOGGER

logger = init_logger(LOGGER)

_MOST_ROWS = 128  # of a segment, beyond which tiles are the same
_MANY_KEYS = 1 << 20  # of which parts may be cut


def warm_up(vllm_config: VllmConfig, layers: Iterable[Any], device: torch.device) -> None:
    """Compile what the sampler and these attention layers, whose KV caches are there, may run.

    Not with vLLM's `--kernel-config.enable_jit_warmup=False`.
    """
    if not vllm_config.kernel_config.enable_jit_warmup:
        return
    start, model = perf_counter(), vllm_config.model_config
    if has_kernels(torch.empty(0, device=device)):
        size = model.get_vocab_size()
        # Rows of requests with constraints are float32; only some rows are copies, without padding.
        for dtype in {model.head_dtype, torch.float32}:
            for width in {size, pad_vocab_size(size)}:
                compile_kernels(torch.zeros((1, width), dtype=dtype, device=device)[:, :size])
    seen = set()
    for layer in layers:
        impl = layer.impl
        if isinstance(impl, SegmentAttentionImpl) and impl.runs_kernels:
            cache = layer.kv_cache
            kind = impl.num_heads, impl.num_kv_heads, impl.head_size, cache.dtype, cache.stride()
            if kind not in seen:
                seen.add(kind)
                _compile_attention(layer, model.dtype)
    logger.info("Kernels of block diffusion are there after %.1f s", perf_counter() - start)


def _compile_attention(layer: Any, dtype: torch.dtype) -> None:
    """Attend with no row, in tiles of every size, with keys whole and in parts, and write none."""
    impl, cache = layer.impl, layer.kv_cache
    keys, values = impl.split(cache)
    options: dict[str, Any] = {"kv_scales": impl.scales(layer), "check_values": False}
    query = torch.zeros((1, impl.num_heads, impl.head_size), dtype=dtype, device=cache.device)
    new = query[:, : impl.num_kv_heads].contiguous()
    nowhere = torch.full((1,), -1, device=cache.device)
    write_kv(new, new, keys, values, nowhere, **options)
    none = torch.zeros(2, dtype=torch.int32, device=cache.device)
    table = SegmentTable(none, none[:1], none[:1], none[None, :1])
    inputs = query, keys, table
    tiles = {
        attention_launch(*inputs, max_query_len=rows, max_kv_len=1).tile
        for rows in range(1, _MOST_ROWS + 1)
    }
    for tile in tiles:
        # Where keys may be cut they are computed otherwise, and parts joined.
        for most in 1, _MANY_KEYS:
            launch = attention_launch(*inputs, max_kv_len=most, tile=tile)
            segment_attention(
                query, keys, values, table, scale=impl.scale, launch=launch, **options
            )
