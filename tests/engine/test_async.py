# SPDX-License-Identifier: Apache-2.0
"""Async scheduling: the next step is scheduled while one is in flight; vLLM's default on a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from tests.conftest import counter, tokens_of
from tests.engine.test_golden import request_of
from tests.engine.test_static_shapes import every_request, generate
from vllm_nbdiff.engine.chooser import DraftChooser, Verified

SIZES: dict[str, Any] = {"block_length": 8, "max_num_batched_tokens": 160, "max_model_len": 256}


@pytest.fixture(scope="module")
def synchronous(golden_checkpoint: Any, make_llm: Callable[..., Any]) -> Iterator[Any]:
    yield make_llm(golden_checkpoint, **SIZES)


@pytest.fixture(scope="module", params=[True, False], ids=["static", "dynamic"])
def engine(
    request: Any,
    synchronous: Any,
    golden_checkpoint: Any,
    make_async_llm: Callable[..., Any],
) -> Iterator[Any]:
    """An engine with two batches in flight."""
    nbdiff = {"static_shapes": request.param}
    yield make_async_llm(golden_checkpoint, additional_config={"nbdiff": nbdiff}, **SIZES)


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
    (prompt, params), *_ = every_request()
    params.max_tokens = 64
    for room in (1, 5, 8, 13, 20):
        prompt = {"prompt_token_ids": [(3 * j) % 500 for j in range(256 - room)]}
        text = tokens_of(engine.generate([prompt], params, use_tqdm=False))[0]
        assert len(text) == room


def test_one_token_costs_no_block(engine: Any) -> None:
    """A request that wants its seed alone ends in its first forward; one more may be in flight."""
    name = "vllm:diffusion_num_denoising_steps"
    before = counter(engine, name)
    for extra in ({}, {"nbdiff_mode": "verify"}, {"nbdiff_mode": "ar"}):
        params = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, extra_args=extra or None
        )
        outputs = engine.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
        assert [len(text) for text in tokens_of(outputs)] == [1]
    assert counter(engine, name) - before <= 3 * 2


def test_requests_that_end_beside_auto(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is scheduled once more before its end is known, and then reads nothing."""
    widths: set[int] = set()
    observe = DraftChooser.observe

    def noted(self: DraftChooser, seen: Verified) -> None:
        widths.update(seen.width.tolist())
        observe(self, seen)

    monkeypatch.setattr(DraftChooser, "observe", noted)
    prompts = [{"prompt_token_ids": [(7 * i + 3 * j) % 500 for j in range(9)]} for i in range(8)]

    def texts(*modes: dict[str, Any]) -> list[list[int]]:
        params = [
            SamplingParams(
                temperature=0, max_tokens=20 + 3 * i, ignore_eos=True, detokenize=False,
                extra_args=mode,
            )
            for i, mode in enumerate(modes)
        ]  # fmt: skip
        return tokens_of(engine.generate(prompts, params, use_tqdm=False))

    expected = texts(*8 * [{"nbdiff_mode": "ar"}])
    verify, auto = {"nbdiff_mode": "verify", "nbdiff_fan_out": 3}, {"nbdiff_mode": "auto"}
    for _ in range(4):
        assert texts(*6 * [verify], *2 * [auto]) == expected
    assert min(widths) >= 1
