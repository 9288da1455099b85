# SPDX-License-Identifier: Apache-2.0
"""Step maps: replayed, every position filled at its step and with the best token there, they give
the text."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.conftest import MASK, counter, options
from vllm_nbdiff.reference import Context, Sampling

LENGTH, BLOCKS = 8, 4
STATIC = {"additional_config": {"nbdiff": {"static_shapes": True}}}
FEW_PAGES = {"max_model_len": 352, "num_gpu_blocks_override": 16, "block_size": 32}
ENGINES: dict[str, dict[str, Any]] = {
    "looped": {"max_num_batched_tokens": 96},
    "asynchronous, preempted": {**STATIC, **FEW_PAGES},
}
DIFFUSION: list[dict[str, Any]] = [
    options(threshold=0.3, small_blocks=2),
    options(threshold=0.3, small_blocks=2, fused_commit=1),
    options(threshold=0.05, small_blocks=1),
    options(algorithm="entropy", threshold=0.3, small_blocks=2),
    options(threshold=1, small_blocks=2, fused_commit=1),
    options(algorithm="freedave", small_blocks=2),
    {**options(threshold=0.9, small_blocks=1), "diffusion_max_steps": 3},
]
LOSSLESS = [
    options(mode="ar"),
    options(mode="verify", draft_length=7, draft_steps=2),
    options(mode="verify", fused_commit=1),
    options(mode="auto"),
]


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: Any,
    golden_checkpoint: Path,
    make_llm: Callable[..., Any],
    make_async_llm: Callable[..., Any],
) -> Any:
    """Its name and the engine."""
    make = make_async_llm if request.param.startswith("asynchronous") else make_llm
    settings = ENGINES[request.param]
    return request.param, make(golden_checkpoint, block_length=LENGTH, **settings)


@pytest.fixture(scope="module")
def prompts(golden_cases: list[dict[str, Any]]) -> list[list[int]]:
    return [case["prompt"] for case in golden_cases if len(case["prompt"]) > 8][:2]


Replay = Callable[[list[int], list[int]], list[int]]


@pytest.fixture(scope="module")
def replay(golden_checkpoint: Path) -> Replay:
    """`replay(prompt, step_map)`: the text in which each position is filled with its best token, at
    its step."""
    model = AutoModelForCausalLM.from_pretrained(golden_checkpoint, attn_implementation="sdpa")
    model = model.float()

    @functools.cache
    def replayed(prompt: tuple[int, ...], steps: tuple[int, ...]) -> list[int]:
        context, sampling = Context(model), Sampling(MASK)
        logits = context.append(prompt)
        text: list[int] = []
        for begin in range(0, len(steps), LENGTH):
            own = steps[begin : begin + LENGTH]
            canvas = [sampling.draw_text(logits)] + [MASK] * (LENGTH - 1)
            assert own[0] == -1 and sorted(set(own)) == list(range(-1, max(own) + 1))
            for step in range(max(own) + 1):
                rows = context.look(canvas)
                for place in (place for place in range(LENGTH) if own[place] == step):
                    canvas[place] = sampling.draw_text(rows[place - 1])
            text += canvas
            logits = context.append(canvas)
        return text

    return lambda prompt, steps: replayed(tuple(prompt), tuple(steps))


def params(extra: dict[str, Any], asks: int = 1, **more: Any) -> SamplingParams:
    asked = {"temperature": 0, "max_tokens": BLOCKS * LENGTH, "ignore_eos": True}
    return SamplingParams(
        **asked | more, detokenize=False, extra_args=extra | options(step_map=asks)
    )


def test_replayed_it_gives_the_text(
    engine: tuple[str, Any], prompts: list[list[int]], replay: Replay
) -> None:
    """All in one batch with lossless modes, where it is the order of the text, and with requests
    that do not ask; twice, the second time from the prefix cache."""
    name, llm = engine
    cases = list(itertools.product(prompts, DIFFUSION))
    others = list(itertools.product(prompts, LOSSLESS))
    silent = list(itertools.product(prompts[:1], DIFFUSION + LOSSLESS))
    asked = [params(extra) for _, extra in cases + others]
    asked += [params(extra, asks=0) for _, extra in silent]
    requests = [{"prompt_token_ids": prompt} for prompt, _ in cases + others + silent]
    for _ in range(2):
        outputs = [output.outputs[0] for output in llm.generate(requests, asked, use_tqdm=False)]
        for (prompt, _), output in zip(cases, outputs, strict=False):
            assert replay(prompt, output.step_map) == output.token_ids
        for output in outputs[len(cases) : -len(silent)]:
            assert output.step_map == list(range(BLOCKS * LENGTH))
        for output in outputs[-len(silent) :]:
            assert output.step_map is None and output.sampling_mask is None
    # One position a step, whether each is run or drafted.
    slow = [output.step_map for output in outputs[4 : len(cases) : len(DIFFUSION)]]
    assert slow == [output.step_map for output in outputs[5 : len(cases) : len(DIFFUSION)]]
    assert slow[0] != outputs[0].step_map
    # Another order gives another text.
    fast = outputs[0].step_map
    backwards = [step if step < 0 else max(fast[:LENGTH]) - step for step in fast[:LENGTH]]
    assert replay(prompts[0], backwards) != outputs[0].token_ids[:LENGTH]
    assert (counter(llm, "vllm:num_preemptions") > 0) == ("preempted" in name)


def test_a_number_for_each_token(engine: tuple[str, Any], prompts: list[list[int]]) -> None:
    """Of text that ends early, is sampled, or comes in pieces or more and more; `n` of it."""
    llm = engine[1].llm_engine
    kinds = list(RequestOutputKind)
    cases = list(itertools.product(prompts[:2], kinds, DIFFUSION[:1] + LOSSLESS[:2], (1, 3)))
    for index, (prompt, kind, extra, n) in enumerate(cases):
        sampling = SamplingParams(
            temperature=0.7 if n > 1 else 0, seed=5, n=n, max_tokens=45, output_kind=kind,
            stop_token_ids=list(range(0, 500, 23)), detokenize=False,
            extra_args=extra | options(step_map=1),
        )  # fmt: skip
        llm.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    found: dict[tuple[str, int], list[tuple[list[int], list[int]]]] = {}
    while llm.has_unfinished_requests():
        for request in llm.step():
            for output in request.outputs:
                pieces = found.setdefault((request.request_id, output.index), [])
                pieces.append((list(output.token_ids), list(output.step_map or ())))
    texts: dict[tuple[int, int], Any] = {}
    for (name, choice), pieces in found.items():
        prompt, kind, extra, _ = cases[int(name)]
        assert all(len(tokens) == len(steps) for tokens, steps in pieces)
        tokens, steps = (list(itertools.chain(*part)) for part in zip(*pieces, strict=True))
        if kind != RequestOutputKind.DELTA:
            tokens, steps = pieces[-1]
        lossless = "nbdiff_mode" in extra
        if lossless:
            assert steps == list(range(len(tokens)))
        else:
            starts = range(0, len(tokens), LENGTH)
            assert all((step == -1) == (place in starts) for place, step in enumerate(steps))
        same = int(name) % 6 + 100 * (int(name) // (6 * len(kinds)))
        assert texts.setdefault((same, choice), (tokens, steps)) == (tokens, steps)
    assert any(len(pieces) > 1 for pieces in found.values())
    assert len({len(tokens) for tokens, _ in texts.values()}) > 3
