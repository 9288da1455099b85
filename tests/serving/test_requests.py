# SPDX-License-Identifier: Apache-2.0
"""Both endpoints, refused input, a client that leaves, and the metrics."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from tests.serving.server import NAME, Server
from vllm_nbdiff.adapt import problems

QUESTION = "Today is Friday. The party of Carla is in 12 days. On which day is the party?"
PROMPT = f"<|user|>{QUESTION}<|assistant|>"
MASK_TOKEN = "<|mask|>"


def chat(client: openai.OpenAI, **options: Any) -> Any:
    """Ask the question as a conversation, greedily."""
    return client.chat.completions.create(
        **{
            "model": NAME,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 40,
            **options,
        },
    )


def complete(client: openai.OpenAI, **options: Any) -> Any:
    """Ask the question as text that the chat template would give, greedily."""
    return client.completions.create(
        **{"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 40, **options}
    )


def test_completion_and_its_stream_agree(client: openai.OpenAI) -> None:
    whole = complete(client)
    pieces = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].usage == whole.usage
    # A block arrives at a time.
    assert 1 < len(pieces[:-1]) < whole.usage.completion_tokens


def test_chat_and_its_stream_agree(client: openai.OpenAI) -> None:
    whole = chat(client)
    pieces = [chunk.choices[0] for chunk in chat(client, stream=True)]
    text = "".join(piece.delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason


def test_answers_are_exact(client: openai.OpenAI) -> None:
    """The served model solves problems it was not trained on."""
    asked = problems.held_out(16, seed=7)
    exact = 0
    for problem in asked:
        response = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": problem.prompt}],
            temperature=0,
            max_tokens=256,
        )
        exact += problems.is_exact(problem, response.choices[0].message.content or "")
    assert exact >= 12


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"vllm_xargs": {"nbdiff_treshold": 0.5}}, "nbdiff_treshold"),
    "string for a number": ({"vllm_xargs": {"nbdiff_threshold": "high"}}, "nbdiff_threshold"),
    "number for a name": ({"vllm_xargs": {"nbdiff_algorithm": 1}}, "nbdiff_algorithm"),
    "fraction for a count": ({"vllm_xargs": {"diffusion_max_steps": 2.5}}, "diffusion_max_steps"),
    "list for a number": ({"vllm_xargs": {"nbdiff_small_blocks": [4]}}, "nbdiff_small_blocks"),
    "unknown algorithm": ({"vllm_xargs": {"nbdiff_algorithm": "best"}}, "nbdiff_algorithm"),
    "threshold above 1": ({"vllm_xargs": {"nbdiff_threshold": 1.5}}, "nbdiff_threshold"),
    "no steps": ({"vllm_xargs": {"diffusion_max_steps": 0}}, "diffusion_max_steps"),
    "block too long": ({"vllm_xargs": {"nbdiff_block_length": 64}}, "nbdiff_block_length"),
    "not divisible": ({"vllm_xargs": {"nbdiff_small_blocks": 5}}, "nbdiff_small_blocks"),
    "logprobs": ({"logprobs": 2000}, "logprobs"),
    "prompt logprobs": ({"prompt_logprobs": 2000}, "prompt_logprobs"),
    "grammar": ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs"),
    "schema": ({"structured_outputs": {"json": {"type": "what"}}}, "structured_outputs"),
    "grammar with freedave": (
        {
            "structured_outputs": {"choice": ["a", "b"]},
            "vllm_xargs": {"nbdiff_algorithm": "freedave"},
        },
        "structured_outputs",
    ),
    "mask token as text": ({"prompt": f"Fill {MASK_TOKEN} in"}, "mask token"),
    "mask token as id": ({"prompt": [5, 2, 7]}, "mask token"),
    "prompt too long": ({"prompt": [5] * 600}, "512"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_by_name(client: openai.OpenAI, what: str) -> None:
    """HTTP 400 that names the key; the server goes on answering."""
    body, named = REFUSED[what]
    with pytest.raises(openai.BadRequestError, match=named) as error:
        complete(client, extra_body=body)
    assert error.value.status_code == 400
    assert complete(client, max_tokens=5).usage.completion_tokens == 5


@pytest.mark.parametrize("ask", [complete, chat])
def test_streams_are_refused_before_they_start(client: openai.OpenAI, ask: Any) -> None:
    """HTTP 400 for them as well, not 200 with an error inside."""
    bad = {"vllm_xargs": {"nbdiff_threshold": -1}}
    with pytest.raises(openai.BadRequestError, match="nbdiff_threshold"):
        ask(client, stream=True, extra_body=bad)
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        ask(client, stream=True, extra_body={"prompt_logprobs": 1})


def test_chat_refuses_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        chat(client, logprobs=True, top_logprobs=2000)
    with pytest.raises(openai.BadRequestError, match="mask token"):
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": f"Fill {MASK_TOKEN} in"}]
        )


def test_client_that_leaves_frees_its_request(server: Server, client: openai.OpenAI) -> None:
    """A stream closed after its first block ends in the engine, long before its last token."""
    generated = server.metric("vllm:generation_tokens_total")
    wanted = {"n": 8, "max_tokens": 480, "temperature": 1.0}
    slow = {"ignore_eos": True, "vllm_xargs": {"nbdiff_threshold": 1.0, "nbdiff_small_blocks": 1}}
    stream = complete(client, stream=True, extra_body=slow, **wanted)
    next(iter(stream))
    assert server.metric("vllm:num_requests_running") > 0
    stream.close()
    deadline = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:generation_tokens_total") - generated < 8 * 480


def test_diffusion_counters(server: Server, client: openai.OpenAI) -> None:
    """vLLM's counters of diffusion models are exported and count this model's work."""
    names = ("denoising_steps", "canvas_positions", "committed_tokens")

    def read() -> list[float]:
        return [server.metric(f"vllm:diffusion_num_{name}_total") for name in names]

    before = read()
    one_a_step = {"nbdiff_threshold": 1.0, "nbdiff_small_blocks": 1}
    complete(client, max_tokens=64, extra_body={"ignore_eos": True, "vllm_xargs": one_a_step})
    steps, positions, committed = (b - a for a, b in zip(before, read(), strict=True))
    # Two blocks of 32: the seed is given, 31 positions are filled one a step; at most one commit
    # each, since the last block needs none.
    assert 2 * 31 <= steps <= 2 * 32
    assert (positions, committed) == (32 * steps, 64)
