# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities over HTTP, whole and in a stream."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

from tests.serving.test_requests import PROMPT, chat, complete

MODES = [{}, {"nbdiff_mode": "verify"}, {"nbdiff_mode": "ar"}]


@pytest.mark.parametrize("xargs", MODES, ids=str)
def test_completion(client: openai.OpenAI, xargs: dict[str, str]) -> None:
    """`echo` adds the prompt's; a stream gives the same numbers in pieces."""
    body = {"vllm_xargs": xargs} if xargs else {}
    whole = complete(client, logprobs=3, extra_body=body)
    found = whole.choices[0].logprobs
    assert len(found.tokens) == whole.usage.completion_tokens
    for chosen, best in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert chosen <= max(best.values()) <= 0 and len(best) in (3, 4)
    pieces = [
        p.choices[0].logprobs for p in complete(client, logprobs=3, stream=True, extra_body=body)
    ]
    assert [x for piece in pieces if piece for x in piece.token_logprobs] == found.token_logprobs
    echoed = complete(client, logprobs=3, echo=True, extra_body=body)
    assert echoed.choices[0].text == PROMPT + whole.choices[0].text
    scores = echoed.choices[0].logprobs.token_logprobs
    assert scores[0] is None and len(scores) == echoed.usage.total_tokens
    assert scores[-len(found.tokens) :] == pytest.approx(found.token_logprobs, abs=2e-5)


def test_a_prompt_is_scored_as_it_would_be_generated(client: openai.OpenAI) -> None:
    """Log-likelihood of an answer: from the prompt's scores, and from decoding it."""
    ar = {"vllm_xargs": {"nbdiff_mode": "ar"}}
    given = complete(client, logprobs=0, extra_body=ar).choices[0]
    scored = complete(
        client, prompt=PROMPT + given.text, max_tokens=1, logprobs=0, echo=True, extra_body=ar
    )
    count = len(given.logprobs.tokens) - (given.finish_reason == "stop")
    scores = scored.choices[0].logprobs.token_logprobs[:-1][-count:]
    assert scores == pytest.approx(given.logprobs.token_logprobs[:count], abs=2e-5)


def test_chat(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens
    assert all(math.isfinite(token.logprob) and len(token.top_logprobs) == 2 for token in content)


@pytest.mark.parametrize("xargs", MODES, ids=str)
def test_tokens_asked_for_by_id(client: openai.OpenAI, xargs: dict[str, str]) -> None:
    """Their scores are those that they have among the best, whole and in a stream."""
    body: dict[str, Any] = {"return_tokens_as_token_ids": True, "vllm_xargs": xargs}
    best = chat(client, logprobs=True, top_logprobs=20, extra_body=body).choices[0]
    scores = [{o.token: o.logprob for o in one.top_logprobs} for one in best.logprobs.content]
    names = list(scores[0])[3:5]
    body["logprob_token_ids"] = [int(name.removeprefix("token_id:")) for name in names]
    for stream in (False, True):
        given = chat(client, logprobs=True, stream=stream, extra_body=body)
        choices = [piece.choices[0] for piece in given] if stream else given.choices
        content = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
        assert [one.token for one in content] == [one.token for one in best.logprobs.content]
        for one, known in zip(content, scores, strict=True):
            found = {other.token: other.logprob for other in one.top_logprobs}
            assert set(names) <= set(found) <= {*names, one.token}
            for name in set(found) & set(known):
                assert found[name] == pytest.approx(known[name], abs=2e-5)
        first = {other.token: other.logprob for other in content[0].top_logprobs}
        assert first[names[0]] == pytest.approx(scores[0][names[0]], abs=2e-5)
