# SPDX-License-Identifier: Apache-2.0
"""The table of docs/api.md: it has every field of a request, and what it says of them is so."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import openai
import pytest
import vllm
from packaging.version import Version
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from tests.serving.test_requests import PROMPT, QUESTION, chat, complete

TABLE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| ([chp ]+)(?:, from ([\d.]+))? \| (.+) \|$", re.MULTILINE)
FIELDS = {
    "c": set(CompletionRequest.model_fields),
    "h": set(ChatCompletionRequest.model_fields),
    "p": {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")},
}
FATES = ("honoured", "refused", "no effect")


def rows() -> dict[str, tuple[set[str], str]]:
    """Of the installed vLLM: where each field is, and what happens to it."""
    return {
        name: (set(where.split()), fate)
        for name, where, since, fate in ROW.findall(TABLE)
        if not since or Version(vllm.__version__) >= Version(since)
    }


def with_fate(fate: str) -> set[str]:
    """Fields of a body whose row begins so."""
    return {
        name for name, (where, text) in rows().items() if text.startswith(fate) and where & {*"ch"}
    }


# Bodies whose field is refused.
REFUSED: dict[str, Any] = {
    "chat_template": "{{ messages[0].content }}",
    "media_io_kwargs": {"image": {}},
    "mm_processor_kwargs": {"size": 1},
    "prompt_embeds": "AAAA",
    "suffix": " dollars",
    "thinking_token_budget": 5,
    "use_beam_search": True,
    "watermarking": True,
}
# Bodies whose field changes nothing.
IDLE: dict[str, Any] = {
    "ec_transfer_params": {"a": 1},
    "kv_transfer_params": {"a": 1},
    "length_penalty": 2.0,
    "mm_payload": "none",
    "return_mm_kwargs": False,
    "return_token_offsets": True,
    "routed_experts_prompt_start": 3,
    "session_id": "a talk",
    "user": "somebody",
}


def test_the_table_has_every_field() -> None:
    """And no other, each one where vLLM has it."""
    found = rows()
    assert list(found) == sorted(found) and len(found) == len(set(found))
    for kind, names in FIELDS.items():
        assert {name for name, (where, _) in found.items() if kind in where} == names
    assert [name for name, (_, fate) in found.items() if not fate.startswith(FATES)] == []
    assert with_fate("refused") == set(REFUSED)
    assert with_fate("no effect") == set(IDLE)


def asks(name: str) -> list[Any]:
    """The endpoints that have a field."""
    return [ask for kind, ask in (("c", complete), ("h", chat)) if name in FIELDS[kind]]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(client: openai.OpenAI, name: str) -> None:
    """By name, at each endpoint."""
    for ask in asks(name):
        logprobs = {"logprobs": 1 if ask is complete else True} if "logprob" in name else {}
        with pytest.raises(openai.BadRequestError, match=f"(?i){name.replace('_', '.')}"):
            ask(client, max_tokens=5, extra_body={name: REFUSED[name]} | logprobs)


@pytest.mark.parametrize("ask", [complete, chat])
def test_no_effect(client: openai.OpenAI, ask: Any) -> None:
    kind = "c" if ask is complete else "h"
    body = {name: value for name, value in IDLE.items() if name in FIELDS[kind]}

    def given(answer: Any) -> Any:
        return answer.choices[0].model_dump(exclude_none=True)

    assert given(ask(client, extra_body=body)) == given(ask(client))


def test_best_of(client: openai.OpenAI) -> None:
    """What `n` with `logprobs` is for: other completions, each with its likelihood."""
    ask = {"prompt": "The", "temperature": 1.5}
    answer = complete(client, n=6, seed=3, logprobs=0, **ask)
    scores = [sum(choice.logprobs.token_logprobs) for choice in answer.choices]
    assert len({choice.text for choice in answer.choices}) > 1
    assert all(map(math.isfinite, scores)) and len(set(scores)) > 1
    alone = complete(client, seed=3 + 4, **ask)
    assert alone.choices[0].text == answer.choices[4].text


def test_tokens_of_an_answer(client: openai.OpenAI) -> None:
    """As numbers, in the names of log-probabilities as well, and with the prompt's."""
    more = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    (choice,) = complete(client, logprobs=0, extra_body=more).choices
    assert [f"token_id:{token}" for token in choice.token_ids] == choice.logprobs.tokens
    short = {"truncate_prompt_tokens": 7, "return_token_ids": True}
    for side, tokens in (("left", slice(-7, None)), ("right", slice(7))):
        cut = complete(client, extra_body=short | {"truncation_side": side}).choices[0]
        assert cut.prompt_token_ids == choice.prompt_token_ids[tokens]


def test_ends_of_an_answer(client: openai.OpenAI) -> None:
    whole = complete(client).choices[0].text
    word = whole.split()[4]
    (kept,) = complete(client, stop=word, extra_body={"include_stop_str_in_output": True}).choices
    (left,) = complete(client, stop=word).choices
    assert kept.text == left.text + word == whole[: whole.index(word) + len(word)]
    (late,) = complete(client, stop=word, extra_body={"min_tokens": 12}).choices
    assert len(late.text) > len(kept.text)
    again = {"repetition_detection": {"max_pattern_size": 1, "min_count": 3}}
    same = {"allowed_token_ids": [20], "ignore_eos": True}
    (repeated,) = complete(client, extra_body=again | same).choices
    assert (repeated.finish_reason, len(repeated.text) > 0) == ("repetition", True)


def test_prompts_of_a_chat(client: openai.OpenAI) -> None:
    """What the template made of it, an answer that goes on, and limits by either name."""
    seen = chat(client, extra_body={"return_prompt_text": True})
    assert seen.prompt_text == PROMPT
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The party"}]
    goes_on = {"add_generation_prompt": False, "continue_final_message": True, "echo": True}
    answer = chat(client, extra_body=goes_on | {"messages": talk}).choices[0].message.content
    assert answer.startswith("The party is 12 days")
    assert chat(client, max_completion_tokens=3).usage.completion_tokens == 3
    echoed = complete(client, echo=True, max_tokens=0)
    assert echoed.choices[0].text == PROMPT
