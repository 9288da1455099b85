# SPDX-License-Identifier: Apache-2.0
"""Structured output through the `openai` client: schemas and choices, streamed and not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from transformers import AutoTokenizer

from tests import reasoning_parser
from tests.serving.server import MODEL, serve
from tests.serving.test_requests import chat, complete

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
def thinking_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a server whose model thinks before it answers."""
    log = tmp_path_factory.mktemp("thinking") / "log"
    plugin = f"--reasoning-parser-plugin={reasoning_parser.__file__}"
    with serve(log, "--reasoning-parser=colon", plugin) as running:
        yield running.client()


@pytest.mark.parametrize("mode", MODES)
def test_schema_of_what_was_thought_about(
    thinking_client: openai.OpenAI, compact: dict[str, Any], mode: str
) -> None:
    """Thoughts are free and apart, the answer meets the schema, a stream brings the same."""
    ask = {"response_format": FORMAT, "extra_body": {"vllm_xargs": {"nbdiff_mode": mode}}}
    question = "Ivy has 14 eggs, finds 8 more and gives 2 to Ben. How many eggs does Ivy have?"
    ask["messages"] = [{"role": "user", "content": question}]
    whole = chat(thinking_client, max_tokens=120, **ask, **compact).choices[0]
    assert whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.message.content), SCHEMA)
    thought = whole.message.reasoning
    assert len(thought) > 3 and ":" not in thought
    pieces = list(chat(thinking_client, max_tokens=120, stream=True, **ask, **compact))
    deltas = [piece.choices[0].delta for piece in pieces]
    assert "".join(delta.content or "" for delta in deltas) == whole.message.content
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == thought


def test_a_parser_that_fails_ends_its_request(thinking_client: openai.OpenAI) -> None:
    """And the server goes on."""
    wanted = {"extra_body": {"structured_outputs": {"choice": ["Monday"]}}}
    with pytest.raises(openai.InternalServerError):
        complete(thinking_client, prompt=": what day is it?", **wanted)
    assert complete(thinking_client, prompt="What day is it?", **wanted).choices[0].text
