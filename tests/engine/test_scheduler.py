# SPDX-License-Identifier: Apache-2.0
"""Scheduling without an engine: what each request is given, and what it leaves to others."""

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from tests.conftest import options
from tests.engine.scheduler_bench import PAGE, Bench, L
from vllm_nbdiff.engine import scheduler
from vllm_nbdiff.engine.prefill_share import PrefillShare
from vllm_nbdiff.request import parse_options

FREEDAVE = options(algorithm="freedave", draft_steps=4, small_blocks=1)


@pytest.fixture
def bench(golden_checkpoint: Path) -> Callable[..., Bench]:
    init_none_hash(sha256)

    def make(num_pages: int = 400, budget: int = 256, **arguments: Any) -> Bench:
        return Bench(golden_checkpoint, num_pages, max_num_batched_tokens=budget, **arguments)

    return make


def decoding(bench: Bench, names: list[str], **arguments: Any) -> list[Request]:
    """Requests whose prompts are computed."""
    requests = [bench.add(name, 8, **arguments) for name in names]
    for request in requests:
        bench.prefill(request)
    return requests


def test_pages_are_of_the_request_itself(bench: Callable[..., Bench]) -> None:
    """One request with drafts takes no page of any other; a further block only who fuses."""
    b = bench(budget=512)
    kinds = {
        "plain": None,
        "fused": options(fused_commit=1),
        "drafts": FREEDAVE,
        "verify": options(mode="verify", draft_length=16, fan_out=4),
        "verify fused": options(mode="verify", draft_length=16, fused_commit=1),
        "short": options(block_length=8),
    }
    requests = {kind: b.add(kind, PAGE, extra=extra) for kind, extra in kinds.items()}
    b.step()
    b.step()
    pages = {kind: b.pages(request) for kind, request in requests.items()}
    # The prompt, two blocks that the schedule may emit, and what else the options need: three
    # versions of two pages; the text behind, and four canvases of break points.
    expected = {"plain": 3, "fused": 3 + 1, "drafts": 3 + 6, "short": 3}
    expected |= {"verify": 3 + 2 + 4, "verify fused": 3 + 1}
    assert pages == expected


def test_own_lookahead_is_needed(bench: Callable[..., Bench]) -> None:
    """vLLM asks for as many pages for one request as for any other."""
    b = bench()
    manager: Any = b.scheduler.kv_cache_manager
    allocate, asked = manager.allocate_slots, set[int]()

    def noted(*args: Any, num_lookahead_tokens: int, **kwargs: Any) -> Any:
        asked.add(num_lookahead_tokens)
        return allocate(*args, num_lookahead_tokens=num_lookahead_tokens, **kwargs)

    manager.allocate_slots = noted
    b.add("plain", 8)
    b.add("drafts", 8, extra=FREEDAVE)
    b.step()
    b.step()
    assert len(asked) == 1


def test_drafts_of_one_request_cost_the_others_nothing(bench: Callable[..., Bench]) -> None:
    """With pages for all of them without drafts, all run, and none is preempted."""
    drafts, null_page = 3 + 3 * 2, 1
    b = bench(num_pages=drafts + 16 * 3 + null_page, budget=1024)
    decoding(b, ["drafts"], extra=FREEDAVE)
    plain = [b.add(f"plain {i}", 60) for i in range(16)]
    b.step()
    scheduled = b.step()
    assert all(request.request_id in scheduled.num_scheduled_tokens for request in plain)
    assert not b.preempted


def test_drafts_are_limited_by_the_budget(bench: Callable[..., Bench]) -> None:
    """A forward has rows for seven drafts, so there are pages for no more."""
    b = bench(budget=8 * L, num_pages=80)
    (request,) = decoding(b, ["drafts"], extra=FREEDAVE | options(draft_steps=9))
    b.step()
    assert b.pages(request) <= 3 + 7 * 2


def test_a_second_block_takes_nothing_from_a_prompt(bench: Callable[..., Bench]) -> None:
    """A schedule that computes prompts is one forward, which emits one block at most."""
    b = bench(budget=16 * L)
    decoding(b, [f"canvas {i}" for i in range(4)])
    b.add("prompt", 1600)
    assert dict(b.step().num_scheduled_tokens)["prompt"] == 12 * L


def test_a_prompt_without_pages_holds_no_second_block_back(bench: Callable[..., Bench]) -> None:
    """For longer than a schedule; once there are some it has the tokens that it needs."""
    b = bench(budget=16 * L, num_pages=20)
    (first,) = decoding(b, ["first"], extra=FREEDAVE)
    decoding(b, ["second"])
    b.add("prompt", 12 * PAGE)
    widths = [dict(b.step().num_scheduled_tokens) for _ in range(3)]
    assert widths[0] == {"first": L, "second": L}
    assert widths[1] == widths[2] == {"first": 2 * L, "second": 2 * L}
    b.scheduler.finish_requests(first.request_id, RequestStatus.FINISHED_ABORTED)
    assert dict(b.step().num_scheduled_tokens)["prompt"] == 12 * PAGE


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("budget", [2 * L, 3 * L + 5, 8 * L])
def test_prompt_beside_canvases(
    budget: int, asynchronous: bool, bench: Callable[..., Bench]
) -> None:
    """The prompt gets half the budget, the canvases the rest in turn."""
    b = bench(budget=budget)
    alone = b.prefill(b.add("prompt", 1600))
    b = bench(budget=budget, async_scheduling=asynchronous)
    names = [f"canvas {i}" for i in range(budget // L - 1)]
    decoding(b, names, max_tokens=1900)
    b.scheduled.clear()
    taken = b.prefill(b.add("prompt", 1600))
    assert taken <= 2 * alone + 1
    times = [b.scheduled[name] for name in names]
    assert min(times) >= taken // 2 and max(times) - min(times) <= 1


def test_a_short_prompt_holds_back_no_more_than_it_needs(bench: Callable[..., Bench]) -> None:
    b = bench()
    decoding(b, [f"canvas {i}" for i in range(7)])
    b.add("fits", L)
    assert len(b.step().num_scheduled_tokens) == 8
    b.scheduler.max_num_running_reqs = b.scheduler.max_num_active_reqs = 9
    b.step()
    b.add("one more than fits", L + 1)
    assert len(b.step().scheduled_spec_decode_tokens) == 6 and b.prompt_tokens == L + 1


def test_canvases_do_not_wait_for_what_is_not_admitted(bench: Callable[..., Bench]) -> None:
    """Held back once for a prompt that finds no pages, and not again until a request ends."""
    b = bench(num_pages=49)
    names = [f"canvas {i}" for i in range(7)]
    decoding(b, names)
    b.scheduled.clear()
    prompt = b.add("prompt", 1500)
    for _ in range(4):
        b.step()
    assert sum(b.scheduled.values()) == 4 + 3 * 7 and not prompt.num_computed_tokens
    b.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
    b.step()
    assert prompt.num_computed_tokens == 256


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_last_to_arrive_is_preempted(policy: str, bench: Callable[..., Bench]) -> None:
    """Not a prompt that has been there for longer, though canvases are scheduled before it.

    Only by policy `priority` does a request's own priority matter.
    """
    b, names, old = crowded(bench, policy)
    while not b.preempted:
        b.step()
    if policy == "fcfs":
        assert b.preempted == names[-1:] and b.prefill(old) and "old" not in b.preempted
    else:
        assert b.preempted == ["old"]


def test_preemption_by_arrival_is_needed(bench: Callable[..., Bench]) -> None:
    """vLLM's own policy is to preempt what is scheduled last."""
    b, _, _ = crowded(bench, "fcfs")
    b.scheduler.policy = SchedulingPolicy.FCFS
    while not b.preempted:
        b.step()
    assert b.preempted == ["old"]


def crowded(bench: Callable[..., Bench], policy: str) -> tuple[Bench, list[str], Request]:
    """A long prompt of low priority, and short ones after it that fill the pages before it does."""
    b = bench(num_pages=62, scheduling_policy=policy, long_prefill_token_threshold=64)
    old = b.add("old", 1600, priority=9)
    b.step()
    names = [f"young {i}" for i in range(4)]
    for name in names:
        b.add(name, 8)
    return b, names, old


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_page_of_the_last_token_is_not_cached(
    asynchronous: bool, bench: Callable[..., Bench]
) -> None:
    """The token may have ended the request before its KV was final."""
    assert tokens_computed_again(bench(enable_prefix_caching=True, async_scheduling=asynchronous))


def test_the_page_of_the_last_token_is_not_cached_as_tokens_arrive(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The synchronous scheduler of vLLM 0.33 caches as the asynchronous one does."""
    update = Scheduler._update_request_with_output

    def updated(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = update(self, request, *args, **kwargs)
        self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
        return result

    monkeypatch.setattr(Scheduler, "_update_request_with_output", updated)
    assert tokens_computed_again(bench(enable_prefix_caching=True))


def test_leaving_ends_uncached_is_needed(bench: Callable[..., Bench]) -> None:
    """vLLM's asynchronous scheduler caches the page of the last token."""
    b = bench(enable_prefix_caching=True, async_scheduling=True)
    manager: Any = b.scheduler.kv_cache_manager
    del manager.cache_blocks  # of the instance
    assert not tokens_computed_again(b)


def tokens_computed_again(b: Bench) -> int:
    """Of the one page that a request's prompt fills with the only token that it gets."""
    b.add("first", PAGE - 1, max_tokens=1)
    while b.scheduler.has_requests():
        b.step()
    b.add("second", [1] * (PAGE - 1) + [2] * 9)
    return b.step().num_scheduled_tokens["second"] - 8


def test_options_are_parsed_once(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And forgotten with the request."""
    calls = Counter[str]()

    def counted(extra_args: Any, config: Any) -> Any:
        calls[extra_args["nbdiff_mode"]] += 1
        return parse_options(extra_args, config)

    monkeypatch.setattr(scheduler, "parse_options", counted)
    b = bench()
    for mode in ("verify", "diffusion"):
        b.add(mode, 8, extra=options(mode=mode))
    for _ in range(5):
        b.step()
    assert calls == {"verify": 1, "diffusion": 1}
    b.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    gc.collect()
    assert not b.scheduler._canvases


@pytest.mark.parametrize("canvas", [51, 80, 100])
def test_share_where_a_canvas_is_wider_than_half_the_budget(canvas: int) -> None:
    """Prompts and canvases take turns."""
    share, given = PrefillShare(100), []
    for _ in range(6):
        fits = canvas <= 100 - share.reserve(wanted=1000)
        given.append(100 - canvas * fits)
        if not fits:
            share.settle(given[-1])
    assert given == [100, 100 - canvas] * 3


def test_share_of_prompts_that_are_computed_in_blocks() -> None:
    """Less than a block adds up, so that neither kind starves the other."""
    share, given = PrefillShare(63, chunk=32), []
    for _ in range(6):
        fits = 63 - share.reserve(wanted=1000) >= 32
        given.append((63 - 32 * fits) // 32 * 32)
        if not fits:
            share.settle(given[-1])
    assert given == [0, 32] * 3
    assert PrefillShare(63, chunk=32).reserve(wanted=5) == 5
