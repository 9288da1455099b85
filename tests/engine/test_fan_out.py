# SPDX-License-Identifier: Apache-2.0
"""Drafts for break points: text and forwards of the scheme written out in plain transformers."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from benchmarks.acceptance import ar_text
from tests.conftest import counter, options, tokens_of
from vllm_nbdiff.adapt import problems

NANO = Path(__file__).parents[2] / "examples" / "nbdiff-nano"
MASK, WIDTH, MOST = 2, 16, 60
STEPS = "vllm:diffusion_num_denoising_steps"
STATIC = {"nbdiff": {"static_shapes": True, "max_drafts": 16}}


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        NANO, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def engine(make_llm: Callable[..., Any]) -> Any:
    """With the shapes of a GPU, where nothing that is made depends on measured times."""
    return make_llm(
        NANO, block_length=32, mask=MASK, skip_tokenizer_init=False, additional_config=STATIC,
        max_model_len=1024, block_size=32,
    )  # fmt: skip


@torch.inference_mode()
def draft_behind(model: Any, known: list[int], width: int) -> list[tuple[int, float]]:
    """Tokens and their probabilities for columns 1 to `width` - 1 of a canvas behind `known`, from
    width - 1 masks that see one another and all of `known`, which is causal."""
    ids = torch.tensor([[*known, *[MASK] * (width - 1)]])
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    seen[len(known) :] = True
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = model(ids, attention_mask=bias[None, None]).logits[0, len(known) :]
    chance, token = logits.softmax(-1).max(-1)
    return list(zip(token.tolist(), chance.tolist(), strict=True))


def forwards_of(model: Any, prompt: list[int], text: list[int], fan_out: int) -> int:
    """Forwards behind the prompt's that the scheme needs for AR decoding's `text`."""
    first, last = len(prompt), len(prompt) + MOST - 1
    whole, forwards, start = prompt + text, 0, len(prompt)
    draft: list[tuple[int, float]] = []
    while True:
        # A draft never names the mask, and none is longer than the request.
        drafted = []
        for token, chance in draft[: last - start]:
            if token == MASK:
                break
            drafted.append((token, chance))
        forwards += 1
        held = 1
        while held <= len(drafted) and start + held < len(whole):
            if drafted[held - 1][0] != whole[start + held]:
                break
            held += 1
        reach = [1.0]
        for _, chance in drafted:
            reach.append(reach[-1] * chance)
        breaks = [here - there for here, there in zip(reach, [*reach[1:], 0.0], strict=True)]
        # Behind a token that is read alone there is a draft in any case.
        most = max(fan_out, not drafted)
        best = sorted(range(len(breaks)), key=lambda m: (-max(breaks[m], 1e-9), m))[:most]
        # The text is final, and the token behind it where the schedule has room for that.
        behind = start + held < len(whole) and held < WIDTH * (1 + fan_out)
        if start + held >= first + len(text) - behind:
            return forwards
        begin = start + held
        width = min(WIDTH, last - begin + 1)
        draft = []
        if width > 1 and held - 1 in best:
            draft = draft_behind(model, whole[:begin], width)
        start = begin


@pytest.mark.parametrize("fan_out", [0, 1, 2, 4, 16])
@pytest.mark.parametrize("count", [20, pytest.param(50, marks=pytest.mark.long)])
def test_text_and_forwards(engine: Any, model: Any, fan_out: int, count: int) -> None:
    """Of prompts one by one, where there are rows for all that is asked for."""
    tokenizer = engine.get_tokenizer()
    questions = [f"<|user|>{p.prompt}<|assistant|>" for p in problems.held_out(count)]
    prompts = [tokenizer.encode(question) for question in questions]
    params = SamplingParams(
        temperature=0, max_tokens=MOST,
        extra_args=options(mode="verify", draft_length=WIDTH, fan_out=fan_out),
    )  # fmt: skip
    for prompt in prompts if fan_out in (0, 4) else prompts[::3]:
        expected = ar_text(model, torch.tensor(prompt), MASK, None)[len(prompt) :][:MOST].tolist()
        before = counter(engine, STEPS)
        given = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        assert tokens_of(given) == [expected]
        assert counter(engine, STEPS) - before == forwards_of(model, prompt, expected, fan_out)


def test_drafts_are_counted(engine: Any) -> None:
    names = [f"vllm:diffusion_num_fan_{name}" for name in ("outs", "out_hits")]
    before = [counter(engine, name) for name in names]
    for fan_out in (0, 4):
        params = SamplingParams(
            temperature=0, max_tokens=40, extra_args=options(mode="verify", fan_out=fan_out)
        )
        engine.generate(["<|user|>What is 7 + 5?<|assistant|>"], params, use_tqdm=False)
        after = [counter(engine, name) for name in names]
        assert (after != before) == (fan_out > 0)
    made, hits = (new - old for new, old in zip(after, before, strict=True))
    assert made > hits > 0


def test_drafts_beside_other_drafts(engine: Any) -> None:
    """Neither takes a forward more than alone: what one has drafted no other one changes."""
    prompt = f"<|user|>{problems.held_out(1)[0].prompt}<|assistant|>"
    kinds = (options(mode="verify", fan_out=4), options(algorithm="freedave"))
    params = [SamplingParams(temperature=0, max_tokens=MOST, extra_args=kind) for kind in kinds]

    def forwards(*chosen: SamplingParams) -> float:
        before = counter(engine, STEPS)
        engine.generate([prompt] * len(chosen), list(chosen), use_tqdm=False)
        return counter(engine, STEPS) - before

    assert forwards(*params) == sum(forwards(one) for one in params)


def test_a_guess_that_another_request_left_is_not_taken(make_llm: Callable[..., Any]) -> None:
    """A fused request ends with one in its slot, which is given to a verified request; beside that
    one another fused request begins."""
    llm = make_llm(NANO, block_length=32, mask=MASK, skip_tokenizer_init=False)
    prompts = [f"<|user|>{problem.prompt}<|assistant|>" for problem in problems.held_out(4)]
    fused = options(fused_commit=1) | {"diffusion_max_steps": 1}
    engine, numbers = llm.llm_engine, itertools.count()

    def texts(*requests: tuple[int, int, dict[str, Any], int]) -> list[list[int]]:
        """Of requests that begin after so many steps, with a prompt, options and length each."""
        waiting, found = {str(next(numbers)): own for own in requests}, {}
        order, step = list(waiting), 0
        while waiting or engine.has_unfinished_requests():
            for name, (begin, prompt, extra, length) in list(waiting.items()):
                if begin <= step:
                    params = SamplingParams(
                        temperature=0, max_tokens=length, ignore_eos=True, extra_args=extra
                    )
                    engine.add_request(name, prompts[prompt], params)
                    del waiting[name]
            for output in engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
        return [found[name] for name in order]

    (expected,) = texts((0, 1, options(mode="ar"), 100))
    for late in range(2, 8):
        texts((0, 0, fused, 40))
        verified, ar = (0, 1, options(mode="verify"), 100), (0, 3, options(mode="ar"), 100)
        assert texts(verified, ar, (late, 2, fused, 100))[0] == expected, late
