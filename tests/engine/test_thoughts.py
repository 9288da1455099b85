# SPDX-License-Identifier: Apache-2.0
"""Structured output of a model that thinks first: the grammar is that of its answer."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from random import Random
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter
from vllm.parser.engine.parser_engine import ReasoningEnd

from tests import reasoning_parser
from tests.conftest import counter, options, tokens_of
from tests.engine.grammar_cases import is_valid
from tests.engine.structured import (
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
from vllm_nbdiff.compat import Thoughts
from vllm_nbdiff.engine.matcher import Matcher

PARSER = {
    "backend": "xgrammar",
    "disable_any_whitespace": True,
    "reasoning_parser": "colon",
    "reasoning_parser_plugin": reasoning_parser.__file__,
}
ENGINES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 64},
    "preempted": {"max_model_len": 352, "num_gpu_blocks_override": 14, "block_size": 32},
    "static": {"additional_config": {"nbdiff": {"static_shapes": True}}},
    # The tail of a prompt lies in the first canvas.
    "block-causal": {
        "hf_overrides": {"architectures": ["StableDiffcoderForCausalLM"]},
        "generation_config": "vllm",  # the checkpoint's own has options of NBDiff
    },
}
OF_BLOCK_CAUSAL = [{}, options(threshold=0.3), options(fused_commit=1), {"diffusion_max_steps": 3}]
CONSTRAINTS: list[dict[str, Any]] = [
    {"regex": "[0-9]{3}-[a-z]{2,30}"},
    {"choice": ["Monday", "In the end", "22 - 2 = 20"]},
    {"json": {"type": "object", "properties": {"eggs": {"type": "integer", "maximum": 40}},
              "required": ["eggs"], "additionalProperties": False}},
    {"regex": "(yes|no) (: ){2}[0-9]"},
]  # fmt: skip


def requests_of(extra: dict[str, Any], **more: Any) -> list[tuple[str, SamplingParams]]:
    """Of some prompts thinking has ended already."""
    pairs = zip(PROMPTS[:20], itertools.cycle(CONSTRAINTS), strict=False)
    return [
        (prompt + reasoning_parser.END * (i % 5 == 4), params(constraint, extra_args=extra, **more))
        for i, (prompt, constraint) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def stock_texts() -> list[Any]:
    """What stock vLLM gives, decoding the same weights autoregressively."""
    return stock_endings(requests_of({}), **PARSER)


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: Any,
    stock_texts: Any,  # first: an engine that ends takes process groups along
    make_llm: Callable[..., Any],
) -> Iterator[tuple[str, Any]]:
    own = settings(structured_outputs_config=PARSER, **ENGINES[request.param])
    yield request.param, make_llm(NANO, 32, MASK, **own)


def answer_of(llm: Any, prompt: str, tokens: list[int]) -> str | None:
    """The text behind thoughts; None: there are only these."""
    tokenizer = llm.get_tokenizer()
    (end,) = tokenizer.encode(reasoning_parser.END)
    if not prompt.endswith(reasoning_parser.END):
        if end not in tokens:
            return None
        tokens = tokens[tokens.index(end) + 1 :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.long)])
def test_lossless_modes_are_ar_decoding(
    engine: tuple[str, Any], stock_texts: list[Any], share: int
) -> None:
    """Token for token, all modes in one batch; some once more, from the prefix cache. Engines share
    the pairs of a request and a mode."""
    name, llm = engine
    if name == "block-causal":
        pytest.skip("it has none")
    first = list(ENGINES).index(name)
    pairs = [
        pair
        for j, extra in enumerate(LOSSLESS, first)
        for pair in list(zip(requests_of(extra), stock_texts, strict=True))[j % share :: share]
    ]
    for own in (pairs, pairs[::share]):
        requests, texts = zip(*own, strict=True)
        assert endings(generate(llm, list(requests))) == list(texts)
    assert (counter(llm, "vllm:num_preemptions") > 0) == (name == "preempted")
    assert sum(reason == "stop" for reason, _ in stock_texts) > 8


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}])
@pytest.mark.parametrize("share", [2, pytest.param(1, marks=pytest.mark.long)])
def test_every_answer_is_legal(
    engine: tuple[str, Any], share: int, sampling: dict[str, Any]
) -> None:
    """Whatever a model thinks before. Engines share the pairs of a request and its options."""
    name, llm = engine
    legal = {True: 0, False: 0}
    kinds = OF_BLOCK_CAUSAL if name == "block-causal" else DIFFUSION
    for i, extra in enumerate(kinds, list(ENGINES).index(name)):
        requests = requests_of(extra, **sampling)[i % share :: share]
        for (prompt, own), output in zip(requests, generate(llm, requests), strict=True):
            (end,) = output.outputs
            answer = answer_of(llm, prompt, list(end.token_ids))
            assert end.finish_reason in ("stop", "length")
            wanted = own.structured_outputs
            constraint = {k: v for k, v in vars(wanted).items() if v and k in
                          ("regex", "choice", "json")}  # fmt: skip
            if end.finish_reason == "stop" and answer is not None:
                assert is_valid(constraint, answer)
                legal[prompt.endswith(reasoning_parser.END)] += 1
    assert legal[True] * share > 6 and legal[False] * share > 20


def test_requests_that_share_what_they_ask_for(engine: tuple[str, Any]) -> None:
    """One thinks, the other's prompt has ended that, in either order."""
    _, llm = engine
    shared = params(CONSTRAINTS[0], skip_clone=True)
    prompts = [PROMPTS[0], PROMPTS[1] + reasoning_parser.END]
    expected = [llm.generate([one], shared.clone(), use_tqdm=False)[0] for one in prompts]
    for order in (1, -1):
        outputs = llm.generate(prompts[::order], shared, use_tqdm=False)
        assert tokens_of(outputs)[::order] == tokens_of(expected)


class Grammar:
    """Takes the tokens of one text, and goes back."""

    def __init__(self, text: list[int]) -> None:
        self.text, self.taken = text, 0

    def is_terminated(self) -> bool:
        return self.taken == len(self.text)

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens if tokens == self.text[self.taken : self.taken + 1] else []

    def accept_tokens(self, _: str, tokens: list[int]) -> bool:
        self.taken += len(tokens)
        return True

    def rollback(self, count: int) -> None:
        self.taken -= count


class Parsed:
    """Thinks until `end`."""

    def __init__(self, end: int) -> None:
        self.end = end

    def is_reasoning_end_streaming(self, tokens: list[int], delta: list[int]) -> bool:
        assert tokens[-1:] == delta
        return self.end in delta


@pytest.mark.parametrize("seed", range(20))
def test_back_to_the_final_text(seed: int) -> None:
    """However far it walks on and back, a matcher is where the final text ends."""
    rng, end, answer = Random(seed), 7, [1, 2, 7, 3]
    thoughts = [rng.randint(1, 6) for _ in range(rng.randint(0, 4))]
    text = [*thoughts, end, *answer]
    grammar: Any = Future()
    grammar.set_result((Grammar(answer), None))
    parsed: Any = Parsed(end)
    matcher, final = Matcher(grammar, 3, set(), Thoughts(parsed, [9, end, 9])), 0
    while final < len(text):
        for token in text[final : final + rng.randint(0, 5)]:
            assert matcher.accepts(token)
        if not matcher.thinks and not matcher.has_ended:
            assert not matcher.accepts(99)
        grown = rng.randint(0, 2)
        matcher.follow(text[final : final + grown])
        final = min(final + grown, len(text))
        assert matcher.position == 3 + final
        assert matcher.thinks == (final <= len(thoughts))
        assert matcher.has_ended == (final == len(text))


class EngineParsed(ParserEngineReasoningAdapter):
    """One of vLLM's own kind: 7 ends thinking, 8 too and begins the answer."""

    def __init__(self) -> None:
        """Without a tokenizer."""

    def find_reasoning_end(self, token_ids: Sequence[int]) -> ReasoningEnd:
        for offset, token in enumerate(token_ids):
            if token in (7, 8):
                return ReasoningEnd(offset, token == 8)
        return ReasoningEnd(len(token_ids), False)


@pytest.mark.parametrize(("end", "answer"), [(7, [1, 2]), (8, [8, 2])])
def test_an_answer_may_begin_with_the_end_of_thinking(end: int, answer: list[int]) -> None:
    """As a call of a tool does, which the grammar then takes too."""
    grammar: Any = Future()
    grammar.set_result((Grammar(answer), None))
    matcher = Matcher(grammar, 0, set(), Thoughts(EngineParsed(), []))
    for token in (3, 4, end):
        assert matcher.thinks
        assert matcher.accepts(token)
    assert not matcher.thinks
    rest = answer[1:] if end == 8 else answer
    assert not matcher.accepts(99) and all(map(matcher.accepts, rest)) and matcher.has_ended
    matcher.follow([3, 4])
    assert matcher.thinks and matcher.accepts(end) and matcher.accepts(rest[0])


def test_an_end_of_thinking_that_the_grammar_refuses() -> None:
    """It does not fit, and leaves the matcher where it was."""
    grammar: Any = Future()
    grammar.set_result((Grammar([1]), None))
    matcher = Matcher(grammar, 0, set(), Thoughts(EngineParsed(), []))
    assert not matcher.accepts(8) and matcher.thinks and matcher.accepts(7) and matcher.accepts(1)
