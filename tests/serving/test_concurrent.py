# SPDX-License-Identifier: Apache-2.0
"""64 clients at a time, every kind of option: each answer is that of the same request offline."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.serving import cases
from tests.serving.server import NAME, Server

CLIENTS = 64
Answer = list[tuple[str, str | None]]  # text and finish reason of each choice


@pytest.fixture(scope="module")
def requests() -> list[cases.Case]:
    """What the clients ask."""
    return cases.build(CLIENTS)


@pytest.fixture(scope="module")
def twins(requests: list[cases.Case], offline: Any) -> list[Answer]:
    """The offline answers."""
    texts = [case for case in requests if not case.chat]
    chats = [case for case in requests if case.chat]
    outputs = offline.generate(
        [case.prompt() for case in texts],
        [case.sampling_params() for case in texts],
        use_tqdm=False,
    )
    outputs += offline.chat(
        [case.messages() for case in chats],
        [case.sampling_params() for case in chats],
        use_tqdm=False,
    )
    answers = {
        id(case): [(choice.text, choice.finish_reason) for choice in output.outputs]
        for case, output in zip(texts + chats, outputs, strict=True)
    }
    return [answers[id(case)] for case in requests]


async def answer(client: openai.AsyncOpenAI, case: cases.Case) -> Answer:
    """Ask one request and put the pieces of a stream together."""
    endpoint: Any = client.chat.completions if case.chat else client.completions
    response = await endpoint.create(**case.body())
    if not case.stream:
        return [
            (choice.message.content if case.chat else choice.text, choice.finish_reason)
            for choice in sorted(response.choices, key=lambda choice: choice.index)
        ]
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    async for chunk in response:
        for choice in chunk.choices:
            piece = choice.delta.content if case.chat else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return [(texts[index], reasons[index]) for index in sorted(texts)]


def test_answers_equal_offline_twins(
    server: Server, requests: list[cases.Case], twins: list[Answer]
) -> None:
    """No request is lost, none differs, whatever runs beside it."""

    async def ask_all() -> list[Answer]:
        async with server.async_client() as client:
            return await asyncio.gather(*(answer(client, case) for case in requests))

    answers = asyncio.run(ask_all())
    differing = [
        f"{case}\n  served  {served}\n  offline {offline}"
        for case, served, offline in zip(requests, answers, twins, strict=True)
        if served != offline
    ]
    assert not differing, "\n".join(differing)
    assert server.metric("vllm:num_requests_running") == 0


def test_unseeded_requests_are_all_answered(server: Server) -> None:
    """Random requests without a seed: every one is answered to its full length."""

    async def ask_all() -> list[Any]:
        async with server.async_client() as client:
            calls = (
                client.completions.create(
                    model=NAME,
                    prompt="<|user|>What is 3 + 4?<|assistant|>",
                    temperature=1.0,
                    max_tokens=tokens,
                    extra_body={"ignore_eos": True},
                )
                for tokens in range(1, 33)
            )
            return await asyncio.gather(*calls)

    answers = asyncio.run(ask_all())
    assert [response.usage.completion_tokens for response in answers] == list(range(1, 33))
    assert len({response.choices[0].text for response in answers[16:]}) > 1
