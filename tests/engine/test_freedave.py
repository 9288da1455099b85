# SPDX-License-Identifier: Apache-2.0
"""FreeDave gives the text of one position a step, in fewer forwards."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.conftest import MASK, counter, options, tokens_of
from tests.engine.test_golden import request_of
from tests.engine.test_modes import LOSSLESS
from vllm_nbdiff.engine.forward import Forward, PagedBatch
from vllm_nbdiff.reference import Context, Sampling

FORWARDS = "vllm:diffusion_num_denoising_steps"
ROWS = "vllm:diffusion_num_canvas_positions"
STEPS = (1, 2, 3, 8)
ENGINES: dict[str, dict[str, Any]] = {
    "small pages": {"block_size": 32},
    "large pages": {"block_size": 128},
    "chunked": {"block_size": 32, "max_num_batched_tokens": 96, "enable_prefix_caching": False},
    "one forward": {
        "block_size": 32,
        "additional_config": {"nbdiff": {"max_steps_per_schedule": 1}},
    },
    "asynchronous": {"block_size": 64},
    # Too few pages for all requests: some are preempted and computed again.
    "preempted": {"max_model_len": 352, "num_gpu_blocks_override": 16, "block_size": 32},
}


@pytest.fixture(autouse=True)
def separate_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two rows of a forward write the same KV, and the forward is not too large."""
    forward = PagedBatch.forward

    def checked(self: PagedBatch, *args: Any) -> Forward | None:
        result = forward(self, *args)
        if result is None:
            return None
        for slots in result.slot_mapping.values():
            assert len(set(slots.tolist())) == len(result.input_ids)
        most = self.vllm_config.scheduler_config.max_num_batched_tokens
        assert len(result.input_ids) <= most
        return result

    monkeypatch.setattr(PagedBatch, "forward", checked)


def params(max_tokens: int = 64, arguments: dict[str, Any] | None = None, **extra: Any) -> Any:
    defaults = {"temperature": 0, "max_tokens": max_tokens, "detokenize": False}
    return SamplingParams(**(defaults | (arguments or {})), extra_args=options(**extra))


def one_a_step(**extra: Any) -> dict[str, Any]:
    """Options of the algorithm that FreeDave is to equal."""
    return {"algorithm": "confidence", "threshold": 1.0, **extra}


def run(llm: Any, prompts: list[list[int]], requests: list[Any]) -> tuple[list[Any], float, float]:
    """Texts, forwards and rows."""
    before = counter(llm, FORWARDS), counter(llm, ROWS)
    tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
    texts = tokens_of(llm.generate(tokens, requests, use_tqdm=False))
    return texts, counter(llm, FORWARDS) - before[0], counter(llm, ROWS) - before[1]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("share", [len(STEPS), pytest.param(1, marks=pytest.mark.long)])
def test_text_of_the_reference_code(
    name: str,
    share: int,
    golden_cases: list[dict[str, Any]],
    golden_checkpoint: Path,
    make_llm: Callable[..., Any],
    make_async_llm: Callable[..., Any],
) -> None:
    """In one batch with other algorithms and modes; some once more, from the prefix cache.
    Engines share the pairs of a case and a number of drafts."""
    first = list(ENGINES).index(name)
    make = make_async_llm if name == "asynchronous" else make_llm
    llm = make(golden_checkpoint, block_length=32, **ENGINES[name])
    cases = [case for case in golden_cases if case["block_length"] == 32]
    prompts, requests, expected = [], [], []
    for i, case in enumerate((case for case in cases if case["algorithm"] == "origin"), first):
        for steps in STEPS[i % share :: share]:
            extra = {"algorithm": "freedave", "draft_steps": steps}
            prompts.append(case["prompt"])
            requests.append(params(small_blocks=case["small_blocks"], **extra))
            expected.append(case["expected"])
    for case in cases[first % share :: share]:
        prompts.append(case["prompt"])
        requests.append(request_of(case)[1])
        expected.append(case["expected"])
    for extra in LOSSLESS:
        prompts.append(cases[0]["prompt"])
        requests.append(SamplingParams(temperature=0, max_tokens=40, extra_args=extra))
        expected.append(None)
    texts, _, _ = run(llm, prompts, requests)
    wrong = [i for i, text in enumerate(expected) if text is not None and texts[i] != text]
    assert wrong == []
    assert len({tuple(text) for text in texts[-len(LOSSLESS) :]}) == 1
    assert run(llm, prompts[::share], requests[::share])[0] == texts[::share]
    assert (counter(llm, "vllm:num_preemptions") > 0) == (name == "preempted")


@pytest.fixture(scope="module")
def golden_llm(golden_checkpoint: Path, make_llm: Callable[..., Any]) -> Any:
    return make_llm(golden_checkpoint, block_length=32, block_size=32)


@pytest.mark.parametrize("small_blocks", [1, 4])
def test_fewer_forwards(
    small_blocks: int, golden_llm: Any, golden_cases: list[dict[str, Any]]
) -> None:
    """The more drafts, the fewer forwards and the more rows; with one, nothing but the name."""
    prompts = [case["prompt"] for case in golden_cases if case["block_length"] == 32][::2]
    plain = [params(**one_a_step(small_blocks=small_blocks))] * len(prompts)
    texts, forwards, rows = run(golden_llm, prompts, plain)
    costs = []
    for steps in (1, 2, 4):
        extra = {"small_blocks": small_blocks, "draft_steps": steps}
        drafted = [params(algorithm="freedave", **extra)] * len(prompts)
        given, *cost = run(golden_llm, prompts, drafted)
        assert given == texts
        costs.append(cost)
    assert costs[0] == [forwards, rows]
    assert costs[0][0] > 1.2 * costs[1][0] > 1.2 * costs[2][0]
    assert costs[0][1] < costs[1][1] < costs[2][1]
    default = [params(algorithm="freedave", small_blocks=small_blocks)] * len(prompts)
    assert run(golden_llm, prompts, default) == (texts, *costs[2])


def paper(context: Context, canvas: list[int], size: int, steps: int, mask: int) -> list[int]:
    """Section "FreeDave" of arXiv 2510.00294, not eager, for the sub-blocks of one canvas."""

    def active(x: list[int]) -> list[int]:
        masked = [i for i, token in enumerate(x) if token == mask]
        return [i for i in masked if i // size == masked[0] // size]

    def outputs(x: list[int]) -> list[tuple[float, int, int]]:
        """Confidence, column and token of the active positions, the most confident first."""
        probabilities = context.look(x).softmax(-1)
        found = [(*probabilities[i - 1].max(-1), i) for i in active(x)]
        return sorted(((float(c), i, int(t)) for c, t, i in found), key=lambda f: (-f[0], f[1]))

    def filled(x: list[int], best: list[tuple[float, int, int]]) -> list[int]:
        x = list(x)
        for _, column, token in best:
            assert token != mask
            x[column] = token
        return x

    x, found = canvas, outputs(canvas)
    while True:
        drafts = [filled(x, found[: k + 1]) for k in range(min(steps, len(found)))]
        if mask not in drafts[0]:
            return drafts[0]
        before = context.forwards
        looks = [outputs(draft) if mask in draft else [] for draft in drafts]
        context.forwards = before + 1  # of all drafts
        targets = [filled(draft, look[:1]) for draft, look in zip(drafts, looks, strict=True)]
        j = 0
        while matches := [m for m in range(j + 1, len(drafts)) if drafts[m] == targets[j]]:
            j = max(matches)
        x, found = drafts[j], looks[j]
        if not found:
            return x


def test_forwards_of_the_paper(
    make_checkpoint: Callable[..., Any], make_llm: Callable[..., Any]
) -> None:
    """Tokens and forwards are those of the paper."""
    vocab, blocks, length = 160, 2, 16
    folder, model = make_checkpoint("llama", vocab, seed=4)
    mask = vocab - 1
    llm = make_llm(folder, block_length=length, mask=mask, max_model_len=256, block_size=32)
    settings = [(1, 1), (1, 2), (1, 5), (2, 4), (2, 8), (4, 3)]
    for number, (small_blocks, steps) in enumerate(settings):
        prompt = [(37 * i + 11 * number) % mask for i in range(27 + number)]
        context, text = Context(model), []
        logits = context.append(prompt)
        for _ in range(blocks):
            canvas = [Sampling(mask).draw_text(logits)] + [mask] * (length - 1)
            text += paper(context, canvas, length // small_blocks, steps, mask)
            logits = context.append(text[-length:])
        extra = {"small_blocks": small_blocks, "draft_steps": steps}
        arguments = {"ignore_eos": True}
        request = params(blocks * length, arguments, algorithm="freedave", **extra)
        given, cost, _ = run(llm, [prompt], [request])
        # Those of the prompt and of the last commit are not counted.
        assert (given, cost) == ([text], context.forwards - 2)
        assert cost == blocks * length - 1 if steps == 1 else cost < 0.9 * blocks * length


TINY = 6


@pytest.fixture(scope="module")
def tiny_llm(make_checkpoint: Callable[..., Any], make_llm: Callable[..., Any]) -> Iterator[Any]:
    """A vocabulary so small that the mask is often the best token."""
    folder, _ = make_checkpoint("llama", TINY, seed=3)
    yield make_llm(folder, block_length=8, mask=TINY - 1, max_model_len=96, block_size=32)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_tokens": None},  # up to `max_model_len`
        {"max_tokens": 13},
        {"stop_token_ids": [0]},
        {"min_tokens": 20, "stop_token_ids": [0]},
        {"logit_bias": {2: 1.5}},
        {"allowed_token_ids": [1, 3]},
        {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
        {"bad_words": [[1, 3], [2, 2]]},
    ],
    ids=str,
)
def test_limits_ends_and_sampling_parameters(tiny_llm: Any, arguments: dict[str, Any]) -> None:
    bad_words = (arguments := dict(arguments)).pop("bad_words", None)
    prompts = [[(i * k + i) % (TINY - 1) for i in range(n)] for k, n in enumerate([1, 30, 45, 85])]

    def texts(**extra: Any) -> list[Any]:
        base = {"ignore_eos": True, "max_tokens": 10 if "max_tokens" in arguments else 40}
        requests = [params(arguments=base | arguments, small_blocks=2, **extra) for _ in prompts]
        for request in requests:
            # With a tokenizer vLLM derives these from `bad_words`.
            request._bad_words_token_ids = bad_words
        return run(tiny_llm, prompts, requests)[0]

    plain = texts(algorithm="confidence", threshold=1.0)
    assert any(plain)
    for steps in (2, 4):
        assert texts(algorithm="freedave", draft_steps=steps) == plain


def test_pages_of_drafts_are_not_cached(golden_llm: Any, golden_cases: list[Any]) -> None:
    """A text as the prompt of another request gives what it gives without the cache."""
    prompt = next(case["prompt"] for case in golden_cases if len(case["prompt"]) == 47)
    (first,), *_ = run(golden_llm, [prompt], [params(70, algorithm="freedave", draft_steps=8)])
    assert MASK not in first
    longer = prompt + first
    golden_llm.reset_prefix_cache()
    expected, *_ = run(golden_llm, [longer], [params(40, **one_a_step())])
    golden_llm.reset_prefix_cache()
    run(golden_llm, [prompt], [params(70, algorithm="freedave", draft_steps=8)])
    assert run(golden_llm, [longer], [params(40, **one_a_step())])[0] == expected
