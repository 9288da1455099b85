# SPDX-License-Identifier: Apache-2.0
"""Async scheduling: the next step is scheduled while one is in flight; vLLM's default on a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm.platforms.cpu import CpuPlatform

from tests.conftest import tokens_of
from tests.engine.test_device import every_request, generate
from tests.engine.test_golden import request_of
from vllm_nbdiff.engine.scheduler import NBDiffAsyncScheduler

pytestmark = pytest.mark.usefixtures("device_references")

SIZES: dict[str, Any] = {"block_length": 8, "max_num_batched_tokens": 96, "max_model_len": 256}


@pytest.fixture(scope="module")
def synchronous(golden_checkpoint: Any, make_llm: Callable[..., Any]) -> Iterator[Any]:
    yield make_llm(golden_checkpoint, **SIZES)


@pytest.fixture(scope="module", params=["device", "host"])
def engine(
    request: Any,
    synchronous: Any,
    golden_checkpoint: Any,
    make_llm: Callable[..., Any],
) -> Iterator[Any]:
    """An engine with two batches in flight.

    vLLM turns async scheduling off on CPU.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

        def check(cls: Any, vllm_config: Any) -> None:
            original(cls, vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check))
        additional = {"nbdiff": {"decoder": request.param, "max_steps_per_schedule": 1}}
        llm = make_llm(golden_checkpoint, additional_config=additional, **SIZES)
        core = llm.llm_engine.engine_core.engine_core
        assert isinstance(core.scheduler, NBDiffAsyncScheduler)
        assert core.batch_queue is not None
        yield llm


def test_golden(engine: Any, golden_cases: list[dict[str, Any]]) -> None:
    cases = [c for c in golden_cases if c["block_length"] == 8 and len(c["prompt"]) < 200]
    prompts, params = zip(*(request_of(case) for case in cases), strict=True)
    for _ in range(2):  # the second time from the prefix cache
        outputs = engine.generate(list(prompts), list(params), use_tqdm=False)
        assert tokens_of(outputs) == [case["expected"] for case in cases]


def test_every_option(engine: Any, synchronous: Any) -> None:
    requests = every_request()
    expected = generate(synchronous, requests)
    assert generate(engine, requests) == expected
    assert generate(engine, requests[::-1]) == expected[::-1]


def test_text_ends_at_the_models_length(engine: Any) -> None:
    (prompt, params, _), *_ = every_request()
    params.max_tokens = 64
    for room in (1, 5, 8, 13, 20):
        prompt = {"prompt_token_ids": [(3 * j) % 500 for j in range(256 - room)]}
        text = tokens_of(engine.generate([prompt], params, use_tqdm=False))[0]
        assert len(text) == room
