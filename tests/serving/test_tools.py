# SPDX-License-Identifier: Apache-2.0
"""Calls of tools through the `openai` client, on a checkpoint of our own recipe that makes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import openai
import pytest

from tests.serving.server import MODEL, serve
from vllm_nbdiff.adapt import problems

SCHEMA = {
    "type": "object",
    "properties": {
        "guests": {"type": "integer", "minimum": 1, "maximum": 30},
        "table": {"type": "integer", "minimum": 1, "maximum": 30},
    },
    "required": ["guests", "table"],
    "additionalProperties": False,
}
LOOSE = {"type": "function", "function": {"name": "invite", "parameters": SCHEMA}}
STRICT = {"type": "function", "function": LOOSE["function"] | {"strict": True}}
NAMED = {"type": "function", "function": {"name": "invite"}}
MODES = ["diffusion", "verify", "ar", "auto"]
HELD_OUT = 3  # tables that training never sees

Table = tuple[int, int]


def tables() -> list[Table]:
    """Guests and numbers of tables, shuffled."""
    pairs = list(product(range(3, 25), range(3, 25)))
    Random(0).shuffle(pairs)
    return pairs


def invitation(*wanted: Table) -> str:
    parts = [f"{guests} guests to table {table}" for guests, table in wanted]
    return f"Invite {' and '.join(parts)}."


def call(guests: int, table: int) -> str:
    """As Hermes writes it."""
    body = {"name": "invite", "arguments": {"guests": guests, "table": table}}
    return f"<tool_call>{json.dumps(body)}</tool_call>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, taught by the adaptation command to call a tool where it is asked to."""
    folder = tmp_path_factory.mktemp("calls")
    known = tables()[HELD_OUT:]
    texts = [(invitation(table), call(*table)) for table in known]
    texts += [
        (invitation(one, other), call(*one) + call(*other))
        for one, other in zip(known, known[7:] + known[:7], strict=True)
    ]
    texts += [(problem.prompt, problem.answer) for problem in islice(problems.training(0), 100)]
    with (folder / "data.jsonl").open("w") as data:
        for prompt, answer in texts:
            messages = [("user", prompt), ("assistant", answer)]
            line = {"messages": [{"role": role, "content": text} for role, text in messages]}
            data.write(json.dumps(line) + "\n")
    options = {
        "model": MODEL,
        "data": folder / "data.jsonl",
        "out": folder / "out",
        "batch-tokens": 1024,
        "max-steps": 200,
        "learning-rate": 2e-3,
        "growth-initial": 32,
        "position-bias": 8,
        "threshold": 0.99,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "vllm_nbdiff.adapt", *words, "--skip-engine", "--use-cpu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=450, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder / "out"


@pytest.fixture(scope="module")
def client(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a server that looks for calls of tools."""
    log = tmp_path_factory.mktemp("tools") / "log"
    flags = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")
    with serve(log, *flags, model=checkpoint) as running:
        yield running.client()


def ask(client: openai.OpenAI, prompt: str, mode: str, **body: Any) -> Any:
    messages = [{"role": "user", "content": prompt}]
    xargs = {"vllm_xargs": {"nbdiff_mode": mode}}
    body = {"temperature": 0, "max_tokens": 150, "extra_body": xargs} | body
    return client.chat.completions.create(model="nano", messages=messages, **body)


def calls_of(client: openai.OpenAI, prompt: str, mode: str, **body: Any) -> list[Any]:
    """Names and arguments of the calls that an answer makes, and why it ended; it has no text.

    Asked for twice, whole and as a stream, which must agree.
    """
    choice = ask(client, prompt, mode, **body).choices[0]
    assert not choice.message.content
    whole = [[one.function.name, one.function.arguments] for one in choice.message.tool_calls or []]
    pieces: list[list[str]] = []
    reasons = set()
    for part in (piece.choices[0] for piece in ask(client, prompt, mode, stream=True, **body)):
        assert not part.delta.content
        reasons.add(part.finish_reason)
        for delta in part.delta.tool_calls or ():
            if delta.index == len(pieces):
                pieces.append(["", ""])
            pieces[delta.index][0] += delta.function.name or ""
            pieces[delta.index][1] += delta.function.arguments or ""
    for one, other in zip(pieces, whole, strict=True):
        assert one[0] == other[0] and json.loads(one[1]) == json.loads(other[1])
    assert reasons - {None} == {choice.finish_reason}
    return [*((name, json.loads(text)) for name, text in whole), choice.finish_reason]


@pytest.mark.parametrize("tool", [LOOSE, STRICT], ids=["loose", "strict"])
@pytest.mark.parametrize("mode", MODES)
def test_of_its_own_accord(client: openai.OpenAI, mode: str, tool: dict[str, Any]) -> None:
    """One call and two, of tables that training never saw: those that stand in the plain text.

    A strict tool brings a grammar, under which `diffusion` fills from left to right.
    """
    one, two, three = tables()[:HELD_OUT]
    for wanted in [(one,), (two,), (two, three)]:
        *calls, reason = calls_of(client, invitation(*wanted), mode, tools=[tool])
        assert reason == "tool_calls" and len(calls) == len(wanted)
        for name, arguments in calls:
            assert name == "invite"
            jsonschema.validate(arguments, SCHEMA)
        if tool is STRICT and mode == "diffusion":
            continue
        text = ask(client, invitation(*wanted), mode).choices[0].message.content
        written = [json.loads(body) for body in re.findall("<tool_call>(.*?)</tool_call>", text)]
        assert calls == [(body["name"], body["arguments"]) for body in written]


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
@pytest.mark.parametrize("mode", MODES)
def test_asked_for(client: openai.OpenAI, mode: str, choice: Any) -> None:
    """A call where the model alone would answer with text."""
    prompt = next(problems.training(0)).prompt
    *calls, _ = calls_of(client, prompt, mode, tools=[STRICT], tool_choice=choice)
    assert calls and {name for name, _ in calls} == {"invite"}
    for _, arguments in calls:
        jsonschema.validate(arguments, SCHEMA)


@pytest.mark.parametrize("mode", MODES)
def test_text_beside_tools(client: openai.OpenAI, mode: str) -> None:
    """The same as without tools, and none of it a call."""
    prompt = next(problems.training(0)).prompt
    choice = ask(client, prompt, mode, tools=[LOOSE]).choices[0]
    assert not choice.message.tool_calls and choice.finish_reason == "stop"
    assert choice.message.content == ask(client, prompt, mode).choices[0].message.content
