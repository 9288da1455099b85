# SPDX-License-Identifier: Apache-2.0
"""Structured output: exact in lossless modes, legal in all of them, nothing to its neighbours."""

import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request

from benchmarks.nano import SCHEMA
from tests.conftest import counter, tokens_of
from tests.engine.grammar_cases import is_valid, random_constraint
from tests.engine.structured import (
    COMPACT,
    DIFFUSION,
    LOSSLESS,
    MASK,
    NANO,
    PROMPTS,
    endings,
    generate,
    params,
    settings,
    stock_endings,
)
from vllm_nbdiff.engine.grammars import Matcher

ENGINES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 64},
    "preempted": {"max_model_len": 352, "num_gpu_blocks_override": 14, "block_size": 32},
    "one forward": {"additional_config": {"nbdiff": {"max_steps_per_schedule": 1}}},
    "static": {"additional_config": {"nbdiff": {"static_shapes": True}}},
    "async": {},
    "async static": {"additional_config": {"nbdiff": {"static_shapes": True}}},
    "guidance": {"structured_outputs_config": {**COMPACT, "backend": "guidance"}},
}


def start(name: str, make_llm: Any, make_async_llm: Any) -> Any:
    make = make_async_llm if name.startswith("async") else make_llm
    return make(NANO, block_length=32, mask=MASK, **settings(**ENGINES[name]))


CONSTRAINTS = [random_constraint(Random(seed)) for seed in range(24)]


# Beside a grammar; greedy.
BESIDE: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4},
    {"min_tokens": 3, "stop_token_ids": [70, 71, 72]},
    {"bad_words": ["Fri", "In", "1"]},
    {"logit_bias": {11: 4.0, 20: -5.0}, "frequency_penalty": 0.5},
    {"ignore_eos": True, "max_tokens": 40},
]


def greedy_requests() -> list[tuple[str, SamplingParams]]:
    return [
        (prompt, params(constraint, **BESIDE[i // 2 % len(BESIDE)]))
        for i, (prompt, constraint) in enumerate(zip(PROMPTS, CONSTRAINTS, strict=True))
    ]


@pytest.fixture(scope="module")
def stock_texts() -> dict[str, list[Any]]:
    """Of stock vLLM for `greedy_requests`."""
    backends = ("xgrammar", "guidance")
    return {b: stock_endings(greedy_requests(), **{**COMPACT, "backend": b}) for b in backends}


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: Any,
    stock_texts: Any,  # first: an engine that ends takes process groups along
    make_llm: Callable[..., Any],
    make_async_llm: Callable[..., Any],
) -> Iterator[tuple[str, Any]]:
    yield request.param, start(request.param, make_llm, make_async_llm)


@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.long)])
def test_lossless_modes_are_constrained_ar_decoding(
    engine: tuple[str, Any], stock_texts: dict[str, list[Any]], share: int
) -> None:
    """Token for token, all modes and plain requests in one batch; some once more, from the prefix
    cache. Engines share the pairs of a request and a mode."""
    name, llm = engine
    first = list(ENGINES).index(name)
    expected = stock_texts["guidance" if name == "guidance" else "xgrammar"]
    requests, texts = [], []
    for i, ((prompt, own), text) in enumerate(zip(greedy_requests(), expected, strict=True)):
        if name == "guidance" and own.ignore_eos:
            continue  # vLLM's matcher refuses what follows eos if both are emitted at once
        for extra in LOSSLESS[(first + i) % share :: share]:
            mode = own.clone()
            mode.extra_args = extra
            requests.append((prompt, mode))
            texts.append(text)
        if i % 3 == 0:
            requests.append((prompt, params(None, extra_args=LOSSLESS[i % 2])))
            texts.append(None)
    for part in (slice(None), slice(None, None, share)):
        given = zip(texts[part], endings(generate(llm, requests[part])), strict=True)
        assert [i for i, (text, own) in enumerate(given) if text not in (None, own)] == []
    assert (counter(llm, "vllm:num_preemptions") > 0) == (name == "preempted")


def test_every_text_is_legal(engine: tuple[str, Any]) -> None:
    """Greedy and sampled, in every mode, beside plain requests, which do not notice."""
    _, llm = engine
    plain = [(PROMPTS[i], params(None, extra_args=extra)) for i, extra in enumerate(DIFFUSION)]
    alone = tokens_of(generate(llm, plain))
    for sampling in ({}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}):
        requests, wanted = [], []
        for i, constraint in enumerate(CONSTRAINTS):
            extra = [*DIFFUSION, *LOSSLESS][i % (len(DIFFUSION) + len(LOSSLESS))]
            n = 2 if sampling else 1
            requests.append((PROMPTS[i], params(constraint, n=n, extra_args=extra, **sampling)))
            wanted.append(constraint)
        outputs = generate(llm, requests + plain)
        assert tokens_of(outputs[len(requests) :]) == alone
        ends = [(c, end) for c, each in zip(wanted, outputs, strict=False) for end in each.outputs]
        finished = [(c, end.text) for c, end in ends if end.finish_reason == "stop"]
        assert {end.finish_reason for _, end in ends} <= {"stop", "length"}
        assert len(finished) > 0.7 * len(ends)
        assert [pair for pair in finished if not is_valid(*pair)] == []


@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.long)])
def test_a_seed_gives_the_same_text_drafted_or_not(engine: tuple[str, Any], share: int) -> None:
    """Engines share the requests."""
    name, llm = engine
    texts = []
    for extra in LOSSLESS:
        requests = [
            (
                PROMPTS[i],
                params(CONSTRAINTS[i], temperature=0.9, seed=i, extra_args=extra, top_p=0.95),
            )
            for i in range(list(ENGINES).index(name) % share, len(PROMPTS), share)
        ]
        texts.append(tokens_of(generate(llm, requests)))
    assert all(text == texts[0] for text in texts)


@pytest.fixture(scope="module")
def plain_engine(engine: tuple[str, Any]) -> Any:
    """One engine for what does not depend on how forwards are scheduled."""
    name, llm = engine
    if name != "one forward":
        pytest.skip("once is enough")
    return llm


def finishes(llm: Any, requests: list[tuple[str, SamplingParams]]) -> list[str]:
    return [output.outputs[0].finish_reason for output in generate(llm, requests)]


def test_no_illegal_token_is_emitted_last(plain_engine: Any) -> None:
    """What `min_tokens` leaves behind the end of a text: nothing, and no token stands for it."""
    requests = [
        (PROMPTS[0], params({"regex": "(yes|no)"}, max_tokens=n, min_tokens=n, extra_args=extra))
        for n in (4, 5)
        for extra in [{}, *LOSSLESS]
    ]
    assert endings(generate(plain_engine, requests)) == [("abort", [])] * len(requests)


@pytest.mark.parametrize(
    "constraint",
    [
        {"choice": ["Answer: 12 eggs and then 3"]},
        {"choice": ["6"]},
        {"regex": "[0-9]{1,2}"},
        {"json": {"type": "integer", "minimum": -3, "maximum": 40}},
    ],
    ids=str,
)
def test_an_aborted_text_is_all_that_was_legal(
    constraint: dict[str, Any], plain_engine: Any
) -> None:
    """In every lossless mode, whatever its schedules held beside it; block diffusion's own text,
    which may be another one, is legal to its end too."""
    short = [
        (PROMPTS[i], params(None, max_tokens=1 + i, extra_args={"nbdiff_mode": "ar"}))
        for i in range(3)
    ]

    def ended(extra: dict[str, Any], beside: list[Any]) -> Any:
        request = PROMPTS[0], params(constraint, min_tokens=40, extra_args=extra)
        found = generate(plain_engine, [request, *beside])[0].outputs[0]
        assert found.finish_reason == "abort"
        return found.text, list(found.token_ids)

    expected = ended({"nbdiff_mode": "ar"}, [])
    for extra in [*LOSSLESS, {"nbdiff_mode": "auto"}]:
        assert [ended(extra, beside) for beside in ([], short)] == [expected] * 2, extra
    texts = {expected[0]}
    for extra in DIFFUSION:
        texts |= {ended(extra, beside)[0] for beside in ([], short)}
    if "choice" in constraint:
        assert texts == {constraint["choice"][0]}
    else:
        assert all(re.fullmatch("-?[0-9]{1,2}", text) for text in texts), texts


def test_a_broken_matcher_ends_its_request_alone(
    plain_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises, in every mode."""
    accepts = Matcher.accepts

    def broken(self: Matcher, token: int) -> bool:
        if self.prompt_length == ill:
            raise RuntimeError("a fault")
        return accepts(self, token)

    modes = [{}, *LOSSLESS]
    for extra in modes:
        requests = [(p, params({"regex": "[0-9]{30}"}, extra_args=extra)) for p in PROMPTS[:4]]
        requests += [(p, params(None, extra_args=extra)) for p in PROMPTS[:3]]
        before = endings(generate(plain_engine, requests))
        lengths = [len(plain_engine.get_tokenizer().encode(p)) for p, _ in requests]
        ill = lengths[0]
        with monkeypatch.context() as patch:
            patch.setattr(Matcher, "accepts", broken)
            after = endings(generate(plain_engine, requests))
        for i, length in enumerate(lengths):
            if i < 4 and length == ill:
                assert after[i] == ("error", [])
            else:
                assert after[i] == before[i]


def test_nothing_left_aborts_a_request(plain_engine: Any) -> None:
    digits = plain_engine.get_tokenizer().encode("0123456789")
    for extra in [{}, *LOSSLESS]:
        none_left = params({"choice": ["Monday"]}, allowed_token_ids=digits, extra_args=extra)
        dead_end = params({"regex": "[0-9]{3} yes"}, allowed_token_ids=digits, extra_args=extra)
        fine = params({"regex": "[0-9]{3}"}, allowed_token_ids=[*digits, 1], extra_args=extra)
        requests = [(PROMPTS[0], own) for own in (none_left, dead_end, fine)]
        assert finishes(plain_engine, requests) == ["abort", "abort", "stop"]


def test_a_worker_compiles_with_the_schedulers_compiler(plain_engine: Any) -> None:
    core = plain_engine.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    generate(plain_engine, [(PROMPTS[0], params({"choice": ["a"]}))])
    assert core.scheduler.structured_output_manager.backend is not None
    assert runner.model_state.grammars._compiler._own is None


def test_requests_name_the_schedulers_backend(plain_engine: Any) -> None:
    """Whatever the front end found for them, as soon as they arrive."""
    scheduler = plain_engine.llm_engine.engine_core.engine_core.scheduler
    generate(plain_engine, [(PROMPTS[0], params({"choice": ["a"]}))])
    own = params({"choice": ["b"]})
    own.structured_outputs._backend = "guidance"
    scheduler.structured_output_manager.grammar_init(Request("other", [5, 6], own, None))
    assert own.structured_outputs._backend == "xgrammar"


def test_drafts_follow_the_grammar(plain_engine: Any) -> None:
    """What is forced is drafted: far fewer forwards than tokens."""
    steps = "vllm:diffusion_num_denoising_steps"
    counts = []
    for extra in LOSSLESS[:2]:
        before = counter(plain_engine, steps)
        outputs = generate(
            plain_engine, [(p, params({"json": SCHEMA}, extra_args=extra)) for p in PROMPTS[:8]]
        )
        tokens = sum(map(len, tokens_of(outputs)))
        counts.append((counter(plain_engine, steps) - before) / tokens)
    assert counts[0] > 0.9 and counts[1] < 0.5
