# SPDX-License-Identifier: Apache-2.0
"""Greedy output is that of the reference NBDiff code, token for token."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import SamplingParams

ALGORITHMS = {"origin": "confidence", "confidence_threshold": "confidence", "entropy": "entropy"}


def request_of(case: dict[str, Any]) -> tuple[dict[str, Any], SamplingParams]:
    """The prompt and sampling parameters of one golden case."""
    # Only `confidence_threshold` has a threshold in the reference; the others fill one position.
    threshold = case["threshold"] if case["algorithm"] == "confidence_threshold" else 1.0
    params = SamplingParams(
        temperature=0,
        max_tokens=64 if case["block_length"] == 32 else 32,
        detokenize=False,
        extra_args={
            "nbdiff_algorithm": ALGORITHMS[case["algorithm"]],
            "nbdiff_threshold": threshold,
            "nbdiff_small_blocks": case["small_blocks"],
        },
    )
    return {"prompt_token_ids": case["prompt"]}, params


ENGINES = {
    "8-chunked-cached": {"block_length": 8, "max_num_batched_tokens": 64},
    "8-one-step": {
        "block_length": 8,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "additional_config": {"nbdiff": {"max_steps_per_schedule": 1}},
    },
    "32-chunked": {
        "block_length": 32,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
    },
    "32-cached": {"block_length": 32, "max_num_batched_tokens": 8192},
    # Too few pages for all requests: some are preempted and computed again.
    "8-preempted": {
        "block_length": 8,
        "max_model_len": 320,
        "num_gpu_blocks_override": 14,
        "block_size": 32,
    },
    "32-preempted": {
        "block_length": 32,
        "max_model_len": 352,
        "num_gpu_blocks_override": 16,
        "block_size": 32,
    },
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: Any, golden_checkpoint: Any, make_llm: Callable[..., Any]) -> Iterator[Any]:
    yield request.param, make_llm(golden_checkpoint, **ENGINES[request.param])


def test_golden(engine: Any, golden_cases: list[dict[str, Any]]) -> None:
    """All cases of one block length in one batch, some prompts twice; these then once more."""
    name, llm = engine
    cases = [case for case in golden_cases if name.startswith(f"{case['block_length']}-")]
    for own in (cases + cases[::3], cases[::3]):
        prompts, params = zip(*map(request_of, own), strict=True)
        outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
        wrong = [
            (case["algorithm"], case["threshold"], case["small_blocks"], len(case["prompt"]))
            for case, output in zip(own, outputs, strict=True)
            if list(output.outputs[0].token_ids) != case["expected"]
        ]
        assert not wrong
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert (preemptions > 0) == name.endswith("preempted")
