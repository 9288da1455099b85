# SPDX-License-Identifier: Apache-2.0
"""Hostile values over HTTP: refused by name or harmless, and the server goes on answering."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serving.server import NAME

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"vllm_xargs": {"diffusion_max_steps": 1 << 63}}, "diffusion_max_steps"),
    "draft steps": (
        {"vllm_xargs": {"nbdiff_mode": "verify", "nbdiff_draft_steps": 1 << 63}},
        "nbdiff_draft_steps",
    ),
    "key without prefix": ({"vllm_xargs": {"threshold": 0.1}}, "did you mean nbdiff_threshold"),
    "last seed": ({"seed": (1 << 63) - 1, "n": 2, "temperature": 1}, "seed"),
    "stream interval": ({"stream_interval": 1 << 64}, "stream_interval"),
    "pattern size": (
        {"repetition_detection": {"max_pattern_size": 1 << 64, "min_count": 2}},
        "repetition_detection",
    ),
    "stop strings": ({"stop": [f"stop {i}" for i in range(300)]}, "stop"),
    "bad words": ({"bad_words": [f"{i} " * 400 for i in range(60)]}, "bad_words"),
    "stop ids": ({"stop_token_ids": [1 << 63]}, "stop_token_ids"),
    "penalty": ({"repetition_penalty": 1e-300}, "repetition_penalty"),
}
HARMLESS: dict[str, dict[str, Any]] = {
    "top_k of 2^63": {"top_k": 1 << 63, "temperature": 1},
    "top_k of 2^65": {"top_k": 1 << 65, "temperature": 1},
    "top_p that float32 does not hold": {"top_p": 1e-300, "temperature": 1},
    "temperature that float32 does not hold": {"temperature": 5e-324},
    "the last seed": {"seed": (1 << 63) - 1, "temperature": 1},
}


def complete(client: openai.OpenAI, stream: bool = False, **body: Any) -> Any:
    return client.completions.create(
        model=NAME, prompt="What is 3 + 4?", max_tokens=5, stream=stream, extra_body=body
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_values_are_refused_by_name(client: openai.OpenAI, what: str, stream: bool) -> None:
    """With HTTP 400, for a stream as well."""
    body, named = HOSTILE[what]
    with pytest.raises(openai.BadRequestError, match=named):
        complete(client, stream, **body)
    assert complete(client, temperature=0, ignore_eos=True).usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["steps", "stop ids"])
def test_responses_are_refused_before_they_begin(
    client: openai.OpenAI, what: str, stream: bool
) -> None:
    body, named = HOSTILE[what]
    with pytest.raises(openai.BadRequestError, match=named):
        client.responses.create(model=NAME, input="Hello", stream=stream, extra_body=body)
    if stream:
        events = client.responses.create(model=NAME, input="Hello", stream=True)
        assert [event.type for event in events][-1] == "response.completed"


@pytest.mark.parametrize("what", HARMLESS)
def test_values_without_effect_are_served(client: openai.OpenAI, what: str) -> None:
    assert complete(client, **HARMLESS[what]).usage.completion_tokens > 0
    assert complete(client, temperature=0, ignore_eos=True).usage.completion_tokens == 5
