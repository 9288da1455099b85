# SPDX-License-Identifier: Apache-2.0
"""Logits that are not numbers end their request with an error, and no other one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.conftest import options

POISON = 77  # a token whose embedding is NaN
ILL = [10, POISON, 11]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
CONSTRAINTS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"allowed_token_ids": list(range(20, 60))},
    {"bad_words": [[3], [4, 5]]},
]
NO_WAY_ON = {"allowed_token_ids": [7, 8], "bad_words": [[7, 7], [7, 8], [8, 7], [8, 8]]}


def start(
    checkpoint: Path,
    make_llm: Callable[..., Any],
    page_size: int,
    static: bool,
    pages: int = 16,
) -> Any:
    return make_llm(
        checkpoint,
        additional_config={"nbdiff": {"static_shapes": static}},
        max_model_len=96,
        num_gpu_blocks_override=pages,
        block_size=page_size,
    )


def run(llm: Any, prompts: list[list[int]], extra: dict[str, Any]) -> list[Any]:
    return answers(llm, prompts, [request(extra) for _ in prompts])


def request(
    extra: dict[str, Any], bad_words: list[list[int]] | None = None, **constraints: Any
) -> SamplingParams:
    params = SamplingParams(
        temperature=0,
        max_tokens=40,
        ignore_eos=True,
        extra_args=extra,
        detokenize=False,
        **constraints,
    )
    # With a tokenizer vLLM derives these from `bad_words`.
    params._bad_words_token_ids = bad_words
    return params


def answers(llm: Any, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [each.outputs[0] for each in llm.generate(given, params, use_tqdm=False)]


def texts(completions: list[Any]) -> list[list[int]]:
    return [each.token_ids for each in completions]


def poison(model: Any) -> None:
    model.model.embed_tokens.weight.data[POISON] = torch.nan


def poison_with_nothing(model: Any) -> None:
    """Rows of -inf where they would be NaN."""
    poison(model)
    compute_logits = model.compute_logits

    def compute(*args: Any) -> torch.Tensor:
        logits = compute_logits(*args)
        return logits.masked_fill(logits.isnan(), -torch.inf)

    model.compute_logits = compute


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


@pytest.mark.parametrize(("static", "page_size"), [(False, 32), (True, 128)])
@pytest.mark.parametrize("fault", [poison, poison_with_nothing])
def test_constraints_hide_no_broken_logits(
    golden_checkpoint: Path,
    make_llm: Callable[..., Any],
    fault: Callable[[Any], None],
    static: bool,
    page_size: int,
) -> None:
    """And where they leave an honest row no token, nothing is broken."""
    llm = start(golden_checkpoint, make_llm, page_size, static, pages=64)
    modes = [{}, options(mode="verify")]
    ill = [request(extra, **own) for extra in modes for own in CONSTRAINTS]
    others = [request(extra, **own) for extra in modes for own in [*CONSTRAINTS, NO_WAY_ON]]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(others))]
    healthy = texts(answers(llm, prompts, others))
    llm.apply_model(fault)
    found = answers(llm, [*[ILL] * len(ill), *prompts], [*ill, *others])
    ended, lived = found[: len(ill)], found[len(ill) :]
    assert [(one.finish_reason, list(one.token_ids)) for one in ended] == [("error", [])] * len(ill)
    assert texts(lived) == healthy
    assert {one.finish_reason for one in lived} == {"length"}
