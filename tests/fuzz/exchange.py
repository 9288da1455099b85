# SPDX-License-Identifier: Apache-2.0
"""Sends calls beside well-behaved requests and says what is wrong with what comes back."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.fuzz.bodies import Call
from tests.fuzz.fields import MODELS, QUESTION
from tests.serving.keeper import is_healthy
from tests.serving.server import NAME, Server

LIMIT = 60.0
"""Seconds in which a call is answered, on a machine that is busy with something else."""

# What else a message may call a field.
ALIASES = {
    "n": ("beam_width",),
    "messages": ("prompt", "roles", "conversation"),
    "response_format": ("structured_outputs",),
    "prompt": ("token", "input"),
    "tool_choice": ("tool",),
    "tools": ("tool",),
    "chat_template": ("template",),
    "vllm_xargs": ("extra_args",),
}
Texts = list[tuple[str, str]]
"""Text and finish reason of each choice of an answer."""


@dataclass(frozen=True)
class Answer:
    """What came back; `status` 0: nothing in time, or the connection broke."""

    status: int
    text: str

    @property
    def error(self) -> dict[str, Any] | None:
        """The error inside, also that of a stream that began well."""
        events = [line.removeprefix("data: ") for line in self.text.splitlines()]
        for event in (self.text, *events):
            if '"error"' in event:
                try:
                    return json.loads(event).get("error")
                except ValueError:
                    continue
        return None


ASK: dict[str, Any] = {
    "model": NAME,
    "prompt": f"<|user|>{QUESTION}<|assistant|>",
    "max_tokens": 48,
}
"""The body of a plain request."""

NEIGHBOURS = tuple(
    Call("/v1/completions", ASK | options)
    for options in (
        {"temperature": 0},
        {"temperature": 0, "vllm_xargs": {"nbdiff_mode": "verify"}},
        {"temperature": 0, "vllm_xargs": {"nbdiff_mode": "ar"}, "max_tokens": 24},
        {"temperature": 1.0, "seed": 5, "top_p": 0.95, "ignore_eos": True},
        {"temperature": 0, "bad_words": ["so"], "min_tokens": 40, "repetition_penalty": 1.2},
    )
)
"""Well-behaved requests: their answers never change."""


async def post(client: httpx.AsyncClient, call: Call) -> Answer:
    """Send one call and read the answer, or what the client stays for."""
    headers = {"content-type": "application/json"}
    lines: list[str] = []
    status = 0
    try:
        async with (
            asyncio.timeout(LIMIT),
            client.stream("POST", call.path, content=call.payload(), headers=headers) as response,
        ):
            status = response.status_code
            async for line in response.aiter_lines():
                lines.append(line)
                if call.leave_after is not None and len(lines) > call.leave_after:
                    break
    except TimeoutError:
        return Answer(0, f"no answer in {LIMIT:g} s, status {status}, so far: {lines}")
    except httpx.HTTPError as error:
        return Answer(0, f"the connection broke, status {status}: {error!r}, so far: {lines}")
    return Answer(status, "\n".join(lines))


def texts(answer: Answer) -> Texts:
    """What a well-behaved request must get. Raises AssertionError when it got none."""
    assert answer.status == 200, f"a well-behaved request: {answer}"
    return [(c["text"], c["finish_reason"]) for c in json.loads(answer.text)["choices"]]


def fault(call: Call, answer: Answer) -> str | None:
    """What is wrong with an answer to a call, or None."""
    error = answer.error
    if answer.status == 0:
        return answer.text
    if answer.status >= 500 or (error is not None and int(error.get("code") or 0) >= 500):
        return f"HTTP {answer.status}: {answer.text[:2000]}"
    if answer.status >= 400 and not names_its_field(answer, call):
        return f"HTTP {answer.status} names no field: {answer.text[:2000]}"
    return None


def names_its_field(answer: Answer, call: Call) -> bool:
    """Whether a refusal names a field of the body or one that the endpoint misses."""
    if not isinstance(call.body, dict):
        return True  # there is none to name
    error = answer.error or {}
    message, parameter = str(error.get("message")), str(error.get("param"))
    if answer.status == 404:
        return "model" in message
    options = call.body.get("vllm_xargs")
    names = {*call.body, *(options if isinstance(options, dict) else ())} - {"model"}
    names |= {alias for name in names for alias in ALIASES.get(name, ())}
    return bool(
        names & set(re.findall(r"\w+", message.lower()))
        or set(parameter.split(".")) & set(MODELS[call.path].model_fields)
        # Keys that a client made up are quoted, whatever they are made of.
        or any(not name.isidentifier() and repr(name) in message for name in names)
    )


def connect(server: Server) -> httpx.AsyncClient:
    """A client without limits of its own."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits)


def answers(server: Server, calls: Sequence[Call]) -> list[Answer]:
    """Send all at once."""

    async def ask_all() -> list[Answer]:
        async with connect(server) as client:
            return await asyncio.gather(*(post(client, call) for call in calls))

    return asyncio.run(ask_all())


def record(server: Server) -> list[Texts]:
    """The answers of the well-behaved requests, each alone on the server."""
    return [texts(answers(server, [call])[0]) for call in NEIGHBOURS]


def send(
    server: Server, group: Sequence[Call], expected: Sequence[Texts]
) -> tuple[list[Answer], list[str]]:
    """Send a group of calls and every well-behaved request at once.

    Returns the answer to each call, and what went wrong.
    """
    got = answers(server, [*group, *NEIGHBOURS])
    wrong = [
        f"{what}\n{call}"
        for call, answer in zip(group, got, strict=False)
        if (what := fault(call, answer)) is not None
    ]
    beside = "\n\n".join(map(str, group))
    if not is_healthy(server):
        wrong.append(f"the server is dead after\n{beside}")
    for call, answer, before in zip(NEIGHBOURS, got[len(group) :], expected, strict=True):
        if answer.status != 200 or texts(answer) != before:
            wrong.append(f"changed: {call}\n{answer}\nexpected {before}, beside\n{beside}")
    return got[: len(group)], wrong
