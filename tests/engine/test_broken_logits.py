# SPDX-License-Identifier: Apache-2.0
"""Logits that are not numbers end their request with an error, and no other one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams

from tests.conftest import options

POISON = 77  # a token whose embedding is NaN
ILL = [10, POISON, 11]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]


def start(checkpoint: Path, make_llm: Callable[..., Any], page_size: int, static: bool) -> Any:
    return make_llm(
        checkpoint,
        additional_config={"nbdiff": {"static_shapes": static}},
        max_model_len=96,
        num_gpu_blocks_override=16,
        block_size=page_size,
    )


def run(llm: Any, prompts: list[list[int]], extra: dict[str, Any]) -> list[Any]:
    params = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, extra_args=extra, detokenize=False
    )
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [each.outputs[0] for each in llm.generate(given, params, use_tqdm=False)]


def texts(completions: list[Any]) -> list[list[int]]:
    return [each.token_ids for each in completions]


def poison(model: Any) -> None:
    model.model.embed_tokens.weight.data[POISON] = torch.nan


def test_only_the_broken_request_ends(
    golden_checkpoint: Path, make_llm: Callable[..., Any]
) -> None:
    """Whatever the mode; and the pages that it wrote serve others."""
    llm = start(golden_checkpoint, make_llm, page_size=32, static=False)
    modes = [{}, options(mode="verify"), options(mode="ar"), options(fused_commit=True)]
    healthy = [texts(run(llm, PROMPTS, extra)) for extra in modes]
    llm.apply_model(poison)
    for extra, expected in zip(modes, healthy, strict=True):
        ill, *others = run(llm, [ILL, *PROMPTS], extra)
        assert ill.finish_reason == "error" and not ill.token_ids
        assert texts(others) == expected
        assert texts(run(llm, PROMPTS, extra)) == expected


def test_with_static_shapes(golden_checkpoint: Path, make_llm: Callable[..., Any]) -> None:
    """Every request has a page of its own: a GPU's kernel reads no slot behind its tokens."""
    llm = start(golden_checkpoint, make_llm, page_size=128, static=True)
    healthy = texts(run(llm, PROMPTS, {}))
    llm.apply_model(poison)
    ill, *others = run(llm, [ILL, *PROMPTS], {})
    assert ill.finish_reason == "error" and not ill.token_ids
    assert texts(others) == healthy
