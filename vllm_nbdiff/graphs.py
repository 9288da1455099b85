# SPDX-License-Identifier: Apache-2.0
"""Start-up: what CUDA graphs capture, and at which sizes.

Full graphs hold decodes alone, whatever rows each has (`compat.capture_any_decode`); forwards with
prompts run piecewise, with attention and KV writes between the pieces.
"""

from __future__ import annotations

from typing import Any

_MOST_REQUESTS = 128
_SMALLEST = (1, 2, 4, 8)
_STEP = 16


def refuse_graphs(vllm_config: Any, copies_kv: bool) -> None:
    """Raise ValueError naming the option by which a graph would capture what changes.

    Asked at start-up, and once more in a worker, when vLLM has chosen what was left to it.

    Args:
        copies_kv: forwards write some rows' KV once more: where drafts are verified.
    """
    from vllm import envs
    from vllm.config.compilation import CUDAGraphMode

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode == CUDAGraphMode.FULL:
        raise ValueError(
            "--compilation-config: cudagraph_mode=FULL captures one segment a request also where "
            "prompts are mixed in; use FULL_AND_PIECEWISE, FULL_DECODE_ONLY or PIECEWISE"
        )
    if not copies_kv or (mode is not None and not mode.has_piecewise_cudagraphs()):
        return
    reasons = {
        "VLLM_USE_BREAKABLE_CUDAGRAPH=1": envs.VLLM_USE_BREAKABLE_CUDAGRAPH,
        "--compilation-config: use_inductor_graph_partition=true": (
            compilation.use_inductor_graph_partition
        ),
        "--compilation-config: splitting_ops without vllm::unified_kv_cache_update": (
            not compilation.splitting_ops_contain_kv_cache_update()
        ),
    }
    for option, used in reasons.items():
        if used:
            raise ValueError(
                f"{option} captures KV writes in piecewise CUDA graphs, and those of drafts for "
                "break points would be lost; leave it out, or use cudagraph_mode=FULL_DECODE_ONLY"
            )


def set_capture_sizes(vllm_config: Any, rows: int) -> None:
    """Capture forwards of up to 128 requests of `rows` rows, unless the user says which.

    vLLM's own sizes end at 512 tokens, which are 16 blocks of 32.
    """
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    if (compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size) == (None,) * 2:
        most = min(scheduler.max_num_seqs, _MOST_REQUESTS) * rows
        sizes = capture_sizes(min(most, scheduler.max_num_batched_tokens))
        compilation.cudagraph_capture_sizes = sizes


def capture_sizes(most: int) -> list[int]:
    """Tokens up to `most`: of 128 and more an eighth at most is padding."""
    sizes, size = [size for size in _SMALLEST if size < most], _STEP
    while size < most:
        sizes.append(size)
        size += max(_STEP, 2 ** (size.bit_length() - 1) // 8)
    return [*sizes, most]
