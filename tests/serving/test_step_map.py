# SPDX-License-Identifier: Apache-2.0
"""Step maps over HTTP, whole and in pieces, beside the tokens that they are of."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serving.test_requests import PROMPT, chat, complete

Choice = list[tuple[list[int], list[int]]]

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "verify": {"vllm_xargs": {"nbdiff_mode": "verify"}},
    "stop string": {"stop": ["Friday", "."]},
    "three sampled": {"n": 3, "temperature": 1.0, "seed": 3},
    "a stop string that stays": {"stop": ["day"], "include_stop_str_in_output": True},
    "echo": {"echo": True},
    "many pieces": {"logprobs": 1, "stream_interval": 7},
}


def body_of(name: str, endpoint: str, step_map: int = 1) -> dict[str, Any]:
    """A request that wants its token ids too."""
    body = dict(REQUESTS[name])
    body["vllm_xargs"] = body.get("vllm_xargs", {}) | {"nbdiff_step_map": step_map}
    if endpoint == "chat" and "logprobs" in body:
        body["logprobs"] = True
    return {"extra_body": body | {"return_token_ids": True}}


def pieces_of(stream: Any) -> dict[int, Choice]:
    """Of each choice the pieces: token ids and steps; either may be missing."""
    found: dict[int, Choice] = {}
    for chunk in stream:
        for choice in chunk.choices:
            ids, steps = (getattr(choice, name, None) for name in ("token_ids", "step_map"))
            found.setdefault(choice.index, []).append((ids or [], steps or []))
    return found


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
@pytest.mark.parametrize("name", REQUESTS)
def test_a_number_for_each_token(client: openai.OpenAI, name: str, endpoint: str) -> None:
    """A stream gives the same numbers in pieces, with their tokens."""
    ask: Any = chat if endpoint == "chat" else complete
    whole = ask(client, **body_of(name, endpoint)).choices
    pieces = pieces_of(ask(client, stream=True, **body_of(name, endpoint)))
    assert len(whole) == len(pieces) == REQUESTS[name].get("n", 1)
    for choice in whole:
        assert len(choice.step_map) == len(choice.token_ids) > 1
        own = pieces[choice.index]
        assert all(len(ids) == len(steps) for ids, steps in own)
        assert [step for _, steps in own for step in steps] == choice.step_map
        first = 0 if name == "verify" else -1
        assert choice.step_map[0] == first and choice.step_map.count(-1) <= 2
    several = any(sum(bool(steps) for _, steps in own) > 1 for own in pieces.values())
    # Two blocks of a lossless mode may come at once.
    assert several or name == "verify" or "stop" in REQUESTS[name]


def test_prompts_of_one_completion(client: openai.OpenAI) -> None:
    body = body_of("three sampled", "completion")
    prompts = [PROMPT, PROMPT[:40]]
    whole = complete(client, prompt=prompts, **body).choices
    pieces = pieces_of(complete(client, prompt=prompts, stream=True, **body))
    assert sorted(pieces) == list(range(6))
    for choice in whole:
        own = pieces[choice.index]
        assert [step for _, steps in own for step in steps] == choice.step_map


def test_without_token_ids_a_piece_of_text_has_its_steps(client: openai.OpenAI) -> None:
    """The first chunk of a chat has a role and no text."""
    xargs = {"vllm_xargs": {"nbdiff_step_map": 1}}
    chunks = [chunk.choices[0] for chunk in chat(client, stream=True, extra_body=xargs)]
    assert [bool(chunk.delta.content) for chunk in chunks] == [
        hasattr(chunk, "step_map") for chunk in chunks
    ]


@pytest.mark.parametrize("ask", [chat, complete])
def test_who_does_not_ask_gets_none(client: openai.OpenAI, ask: Any) -> None:
    for body in ({}, {"extra_body": {"vllm_xargs": {"nbdiff_step_map": 0}}}):
        assert not hasattr(ask(client, **body).choices[0], "step_map")
        chunks = ask(client, stream=True, **body)
        assert not any(hasattr(c, "step_map") for chunk in chunks for c in chunk.choices)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/responses", {"input": "Hello"}),
        ("/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}),
        ("/chat/completions/batch", {"messages": [[{"role": "user", "content": "Hello"}]]}),
    ],
)
def test_other_endpoints_refuse_it(client: openai.OpenAI, path: str, body: Any) -> None:
    body = body | {"model": "nano", "vllm_xargs": {"nbdiff_step_map": 1}}
    with pytest.raises(openai.BadRequestError, match="nbdiff_step_map"):
        client.post(path, body=body, cast_to=object)


@pytest.mark.parametrize("xargs", [{}, {"vllm_xargs": {}}, {"vllm_xargs": {"nbdiff_mode": "ar"}}])
def test_a_batch_of_chats_without_it(client: openai.OpenAI, xargs: dict[str, Any]) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("Hello", "What is 2 + 2?")]
    body = {"model": "nano", "messages": chats, "max_tokens": 4} | xargs
    answer: Any = client.post("/chat/completions/batch", body=body, cast_to=object)
    assert [choice["message"]["role"] for choice in answer["choices"]] == ["assistant"] * 2


def test_options_of_a_batch_that_are_no_object(client: openai.OpenAI) -> None:
    chat = [[{"role": "user", "content": "Hello"}]]
    body = {"model": "nano", "messages": chat, "max_tokens": 4, "vllm_xargs": "x"}
    with pytest.raises(openai.BadRequestError, match="vllm_xargs must be an object"):
        client.post("/chat/completions/batch", body=body, cast_to=object)
