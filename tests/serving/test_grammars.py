# SPDX-License-Identifier: Apache-2.0
"""Structured output through the `openai` client: schemas, choices and tools, streamed and not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from transformers import AutoTokenizer

from tests.serving.server import MODEL, NAME, serve
from tests.serving.test_requests import QUESTION, chat, complete

SCHEMA = {
    "type": "object",
    "properties": {
        "day": {"enum": ["Monday", "Tuesday", "Wednesday"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["day", "days"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "party", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "invite", "parameters": SCHEMA, "strict": True}}
MODES = ["diffusion", "verify", "ar", "auto"]


@pytest.fixture(scope="module")
def compact() -> dict[str, Any]:
    """Against line breaks between the parts of JSON, which this model writes for ever."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = range(len(tokenizer))
    return {"logit_bias": {str(i): -100 for i in tokens if tokenizer.decode([i]).isspace()}}


@pytest.mark.parametrize("mode", MODES)
def test_schema(client: openai.OpenAI, compact: dict[str, Any], mode: str) -> None:
    """A text that meets it, the same for a stream."""
    ask = {"response_format": FORMAT, "extra_body": {"vllm_xargs": {"nbdiff_mode": mode}}}
    whole = chat(client, **ask, **compact).choices[0]
    assert whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.message.content), SCHEMA)
    pieces = [piece.choices[0] for piece in chat(client, stream=True, **ask, **compact)]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.message.content


def test_several_at_once(client: openai.OpenAI) -> None:
    wanted = {"structured_outputs": {"choice": ["Monday", "Sunday"]}}
    choices = complete(client, n=4, temperature=1.0, extra_body=wanted).choices
    assert {choice.text for choice in choices} <= {"Monday", "Sunday"}


@pytest.fixture(scope="module")
def tool_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a server that looks for calls of tools."""
    log = tmp_path_factory.mktemp("tools") / "log"
    with serve(log, "--enable-auto-tool-choice", "--tool-call-parser=hermes") as running:
        yield running.client()


@pytest.mark.parametrize("named", [True, False])
def test_tools(tool_client: openai.OpenAI, compact: dict[str, Any], named: bool) -> None:
    """A tool that has to be called is called with arguments that meet its schema."""
    choice = {"type": "function", "function": {"name": "invite"}} if named else "required"
    answer = tool_client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": QUESTION}],
        tools=[TOOL],
        tool_choice=choice,
        temperature=0,
        max_tokens=100,
        **compact,
    )
    (call, *_) = answer.choices[0].message.tool_calls
    assert call.function.name == "invite"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
