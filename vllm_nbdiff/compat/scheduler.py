# SPDX-License-Identifier: Apache-2.0
"""What the scheduler changes in the KV-cache manager that it has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def allocate_own_lookahead(kv_cache_manager: Any, lookahead: Callable[[Any], int]) -> None:
    """Have every request given pages for its own lookahead, `lookahead(request)` tokens.

    Symptom: one `num_lookahead_tokens` holds for all, so what one request needs is taken from each.
    Upstream: `Scheduler.schedule` (vllm/v1/core/sched/scheduler.py), which calls
    `KVCacheManager.allocate_slots` (vllm/v1/core/kv_cache_manager.py).
    Remove when the scheduler has a hook for a request's lookahead.
    """
    allocate_slots = kv_cache_manager.allocate_slots

    @functools.wraps(allocate_slots)
    def allocate(request: Any, *args: Any, num_lookahead_tokens: int, **kwargs: Any) -> Any:
        # None is wanted where KV is loaded before anything is computed.
        if num_lookahead_tokens:
            num_lookahead_tokens = lookahead(request)
        return allocate_slots(request, *args, num_lookahead_tokens=num_lookahead_tokens, **kwargs)

    kv_cache_manager.allocate_slots = allocate


def leave_ends_uncached(kv_cache_manager: Any) -> None:
    """Keep what ends a request out of the prefix cache: its KV may not be final.

    Symptom: pages are cached as tokens arrive, in the belief that sampled tokens have their KV: by
    the asynchronous scheduler of vLLM 0.32, and by both of 0.33.
    Upstream: `AsyncScheduler` (vllm/v1/core/sched/async_scheduler.py),
    `Scheduler.update_from_output` (vllm/v1/core/sched/scheduler.py).
    Remove when a model can say how many of its tokens have their final KV.
    """
    cache_blocks = kv_cache_manager.cache_blocks

    @functools.wraps(cache_blocks)
    def cache(request: Any, num_computed_tokens: int) -> None:
        if not request.is_finished():
            cache_blocks(request, num_computed_tokens)

    kv_cache_manager.cache_blocks = cache
