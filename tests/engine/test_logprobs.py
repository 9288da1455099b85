# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities: AR's own in the lossless modes and of prompts, those of the step that filled a
token in diffusion."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.conftest import MASK, in_process, options, tokens_of
from tests.engine.test_families import make
from tests.families.test_golden import cases_of
from tests.families.test_golden import request_of as family_request_of
from vllm_nbdiff.reference import Context, Sampling, denoise_step

TOLERANCE = 2e-5
"""Logits of up to 30 in float32 have 2e-6 between neighbours; kernels add in other orders."""
LENGTH, SMALL, EOS = 32, 4, 510
MODES: list[dict[str, Any]] = [
    options(mode="ar"),
    options(mode="verify"),
    options(mode="verify", draft_length=7, draft_steps=2),
    options(mode="auto"),
]
ENGINES: dict[str, dict[str, Any]] = {
    "looped": {},
    "chunked": {"max_num_batched_tokens": 64},
    "static": {"additional_config": {"nbdiff": {"static_shapes": True}}},
    "preempted": {"max_model_len": 352, "num_gpu_blocks_override": 16, "block_size": 32},
}


@pytest.fixture(scope="module")
def prompts(golden_cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cases = [case["prompt"] for case in golden_cases if case["block_length"] == LENGTH][:5]
    return [{"prompt_token_ids": prompt} for prompt in cases]


NAMES = [77, 3, 400, 3]
NAMED = {"logprobs": None, "logprob_token_ids": NAMES}


def ar_params(extra: dict[str, Any] | None = None, **more: Any) -> SamplingParams:
    asked = {"logprobs": 3, "prompt_logprobs": 2, "temperature": 0, "max_tokens": 40}
    return SamplingParams(
        **asked | more, detokenize=False, allowed_token_ids=list(range(MASK)), extra_args=extra
    )


@pytest.fixture(scope="module")
def ar_outputs(prompts: list[dict[str, Any]], golden_checkpoint: Path) -> tuple[Any, Any]:
    """Of stock vLLM, for the same weights: with the likeliest tokens, and with those of `NAMED`."""
    from vllm import LLM

    with in_process():
        llm = LLM(
            model=str(golden_checkpoint),
            hf_overrides={"architectures": ["LlamaForCausalLM"]},
            skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512,
            kv_cache_memory_bytes=1 << 26,
        )  # fmt: skip
    likeliest = llm.generate(prompts, ar_params(), use_tqdm=False)
    named = llm.generate(prompts, ar_params(**NAMED), use_tqdm=False)
    del llm
    return likeliest, named


def assert_scores(given: Any, expected: Any) -> None:
    """Tokens, log-probabilities and ranks of every position; ties among the others may swap."""
    assert len(given) == len(expected)
    for own, other in zip(given, expected, strict=True):
        if other is None:
            assert own is None
            continue
        chosen = next(iter(other))
        assert next(iter(own)) == chosen and len(own) == len(other)
        # One token of about the same probability may be on the other side.
        assert abs(own[chosen].rank - other[chosen].rank) <= 1
        values = [sorted(x.logprob for x in scores.values()) for scores in (own, other)]
        assert values[0] == pytest.approx(values[1], abs=TOLERANCE)
        for token in own.keys() & other.keys():
            assert own[token].logprob == pytest.approx(other[token].logprob, abs=TOLERANCE)


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: Any,
    ar_outputs: Any,  # first: an engine that ends takes process groups along
    golden_checkpoint: Path,
    make_llm: Callable[..., Any],
    make_async_llm: Callable[..., Any],
) -> Iterator[tuple[str, Any]]:
    name = request.param
    factory = make_async_llm if name == "static" else make_llm
    yield name, factory(golden_checkpoint, block_length=LENGTH, **ENGINES[name])


@pytest.mark.parametrize("share", [2, pytest.param(1, marks=pytest.mark.long)])
def test_lossless_modes_have_those_of_ar_decoding(
    share: int, engine: tuple[str, Any], prompts: list[dict[str, Any]], ar_outputs: Any
) -> None:
    """In one batch, beside block diffusion with and without them, twice: prompts are cached.
    Engines share the pairs of a prompt and a mode."""
    name, llm = engine
    given: list[Any] = list(zip(prompts, ar_outputs[0], [{}] * len(prompts), strict=True))
    given += zip(prompts[:2], ar_outputs[1], [NAMED] * 2, strict=False)
    first = list(ENGINES).index(name)
    cases = [
        (own, mode) for i, own in enumerate(given, first) for mode in MODES[i % share :: share]
    ]
    requests = [prompt for (prompt, *_), _ in cases] + prompts
    params = [ar_params(extra, **more) for (*_, more), extra in cases]
    for count in (None, 1, 0, None, 5):
        params.append(SamplingParams(temperature=0.7, seed=3, max_tokens=40, logprobs=count))
    for _ in range(2):
        outputs = llm.generate(requests, params, use_tqdm=False)
        for ((_, expected, _), _), output in zip(cases, outputs, strict=False):
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
            assert_scores(output.outputs[0].logprobs, expected.outputs[0].logprobs)
            assert_scores(output.prompt_logprobs, expected.prompt_logprobs)
        for output, asked in zip(outputs[len(cases) :], params[len(cases) :], strict=True):
            scores = output.outputs[0].logprobs
            if asked.logprobs is None:
                assert scores is None
                continue
            for token, own in zip(output.outputs[0].token_ids, scores, strict=True):
                assert token in own and len(own) in (asked.logprobs, asked.logprobs + 1)


def decode(model: Any, prompt: list[int], blocks: int, threshold: float) -> Any:
    """Tokens of the reference decoder, and the log-probabilities [V] each was chosen from."""
    sampling = Sampling(MASK)
    context = Context(model)
    logits = context.append(prompt)
    tokens: list[int] = []
    scores: list[torch.Tensor] = []
    for _ in range(blocks):
        seed = sampling.draw_text(logits)
        canvas = [seed] + [MASK] * (LENGTH - 1)
        found: dict[int, torch.Tensor] = {0: logits.log_softmax(-1)}
        small = LENGTH // SMALL
        for start in range(0, LENGTH, small):
            while masked := [i for i in range(start, start + small) if canvas[i] == MASK]:
                rows = context.look(canvas).log_softmax(-1)
                step = denoise_step(context, canvas, masked, 0, "confidence", threshold, sampling)
                found |= {i: rows[i - 1] for i in step.positions}
        tokens += canvas
        scores += [found[i] for i in range(LENGTH)]
        logits = context.append(canvas)
    return tokens, scores


def test_diffusion_has_those_of_the_step_that_filled_a_token(
    engine: tuple[str, Any], prompts: list[dict[str, Any]], golden_checkpoint: Path
) -> None:
    name, llm = engine
    if name not in ("looped", "static"):
        pytest.skip("a step is the same however it is scheduled")
    model = AutoModelForCausalLM.from_pretrained(golden_checkpoint, attn_implementation="sdpa")
    extras = [
        options(threshold=0.3, small_blocks=SMALL),
        options(threshold=0.3, small_blocks=SMALL, fused_commit=1),
        options(threshold=1, small_blocks=SMALL),
        options(threshold=1, small_blocks=SMALL, algorithm="freedave"),
    ]
    cases = list(itertools.product(prompts[:3], extras))
    params = [
        SamplingParams(
            temperature=0, max_tokens=2 * LENGTH, ignore_eos=True, logprobs=4, extra_args=extra,
            detokenize=False,
        )
        for _, extra in cases
    ]  # fmt: skip
    named = [one.clone() for one in params[: len(extras)]]
    for one in named:
        one.logprob_token_ids = NAMES
    requests = [prompt for prompt, _ in cases] + prompts[:1] * len(extras)
    outputs = llm.generate(requests, params + named, use_tqdm=False)
    for first, output in zip(outputs[: len(extras)], outputs[len(cases) :], strict=True):
        assert output.outputs[0].token_ids == first.outputs[0].token_ids
    tokens, scores = decode(model.float(), prompts[0]["prompt_token_ids"], 2, 0.3)
    for output in outputs[len(cases) : len(cases) + 2]:
        for token, own, exact in zip(tokens, output.outputs[0].logprobs, scores, strict=True):
            assert own.keys() == {token, *NAMES}
            if token not in NAMES:  # else vLLM gives the place among these
                assert own[token].rank == int((exact >= exact[token]).sum())
            for name, found in own.items():
                assert found.logprob == pytest.approx(float(exact[name]), abs=TOLERANCE)
    for (prompt, extra), output in zip(cases, outputs, strict=False):
        threshold = extra["nbdiff_threshold"]
        tokens, scores = decode(model.float(), prompt["prompt_token_ids"], 2, threshold)
        assert list(output.outputs[0].token_ids) == tokens
        for token, own, exact in zip(tokens, output.outputs[0].logprobs, scores, strict=True):
            assert own[token].logprob == pytest.approx(float(exact[token]), abs=TOLERANCE)
            best = exact.topk(4).values.tolist()
            rest = sorted((x.logprob for x in own.values()), reverse=True)
            assert rest[:4] == pytest.approx(best, abs=TOLERANCE)
            assert own[token].rank == int((exact >= exact[token]).sum())


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_modes_of_logprobs(
    mode: str,
    prompts: list[dict[str, Any]],
    golden_checkpoint: Path,
    make_llm: Callable[..., Any],
) -> None:
    """Processed ones are of the distribution that a token was drawn from."""
    llm = make_llm(golden_checkpoint, block_length=LENGTH, logprobs_mode=mode)
    model = AutoModelForCausalLM.from_pretrained(golden_checkpoint).float()
    asked = {"temperature": 0.8, "seed": 5, "max_tokens": 6, "logprobs": 5, "detokenize": False}
    extra = options(mode="ar")
    cases = [
        SamplingParams(**asked, extra_args=extra),
        SamplingParams(**asked, top_k=3, extra_args=extra),
        SamplingParams(**asked, logit_bias={7: 3.0}, extra_args=extra),
    ]
    prompt = prompts[0]["prompt_token_ids"]
    for params, output in zip(
        cases, llm.generate([prompts[0]] * len(cases), cases, use_tqdm=False), strict=True
    ):
        text = list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].clone()
        if mode.startswith("processed"):
            logits[:, 7] += 3.0 if params.logit_bias else 0
            logits[:, MASK] = -math.inf
            logits = logits / 0.8
            if params.top_k == 3:
                third = logits.topk(3).values[:, -1:]
                logits = logits.masked_fill(logits < third, -math.inf)
        expected = logits.log_softmax(-1) if mode.endswith("logprobs") else logits
        for token, own, row in zip(text, output.outputs[0].logprobs, expected, strict=True):
            assert own[token].logprob == pytest.approx(float(row[token]), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["sdar", "llada2", "fast_dllm_v2"])
def test_block_causal_families(
    family: str, make_llm: Callable[..., Any], make_async_llm: Callable[..., Any]
) -> None:
    """Of each token, the same on a GPU's path; what fills a position is the likeliest token."""
    cases = cases_of(family, 8)
    prompts, params = zip(*map(family_request_of, cases), strict=True)
    for one in params:
        one.logprobs = 1
    found = []
    for factory, nbdiff in ((make_llm, {}), (make_async_llm, {"static_shapes": True})):
        llm = make(factory, family, additional_config={"nbdiff": nbdiff})
        outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
        assert tokens_of(outputs) == [case["expected"] for case in cases]
        found.append([output.outputs[0].logprobs for output in outputs])
        with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
            llm.generate(prompts[0], SamplingParams(prompt_logprobs=1))
        del llm
    for own, other in zip(*found, strict=True):
        assert_scores(own, other)
        assert all(next(iter(scores.values())).rank <= 2 for scores in own)


def test_a_forced_token_is_certain(make_llm: Callable[..., Any]) -> None:
    """The end of thinking that a budget writes into a block; nothing of another request shows."""
    llm = make(make_llm, "nemotron_labs_diffusion")
    prompt = {"prompt_token_ids": list(range(3, 20))}
    for budget in (3, 5, 11, 30):
        params = SamplingParams(
            temperature=0, max_tokens=40, ignore_eos=True, logprobs=2, detokenize=False,
            thinking_token_budget=budget,
        )  # fmt: skip
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        text, scores = output.outputs[0].token_ids, output.outputs[0].logprobs
        assert text[budget] == 77 or 77 in text[:budget]
        for token, own in zip(text, scores, strict=True):
            assert own[token].logprob <= 0
        if 77 not in text[:budget] and budget % 8:
            assert scores[budget][77].logprob == 0 and scores[budget][77].rank == 1
