# SPDX-License-Identifier: Apache-2.0
"""Single requests that could kill, stall or mislead a server: served, or refused by name."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

from tests.fuzz import exchange, values
from tests.fuzz.bodies import Call
from tests.fuzz.fields import QUESTION
from tests.serving.keeper import Keeper
from tests.serving.server import NAME, Server

POWERS = (2**32 + 5, 2**63)
MORE_POWERS = (2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**64 - 1)
VERIFY = {"nbdiff_mode": "verify"}
FREEDAVE = {"nbdiff_algorithm": "freedave"}
ONLY = 16  # a token, and its text
ONLY_TEXT = ","


def options(**xargs: Any) -> dict[str, Any]:
    """A body's `vllm_xargs`."""
    return {"vllm_xargs": xargs}


def words(number: int, length: int) -> list[str]:
    """Different texts of many tokens each."""
    return [f"{i} " + " many pens" * (length // 2) for i in range(number)]


# Bodies beside prompt, max_tokens and temperature 0, and the field that a refusal names.
Case = tuple[str, dict[str, Any]]


def counts(value: int) -> list[Case]:
    """Every field that is an integer or holds some, set to one."""
    return [
        ("diffusion_max_steps", options(diffusion_max_steps=value)),
        ("nbdiff_small_blocks", options(nbdiff_small_blocks=value)),
        ("nbdiff_block_length", options(nbdiff_block_length=value)),
        ("nbdiff_draft_length", options(**VERIFY, nbdiff_draft_length=value)),
        ("nbdiff_draft_steps", options(**VERIFY, nbdiff_draft_steps=value)),
        ("nbdiff_draft_steps", options(**FREEDAVE, nbdiff_draft_steps=value)),
        ("top_k", {"top_k": value}),
        ("top_k", {"top_k": value, "temperature": 1}),
        ("top_k", {"top_k": value, "temperature": 1, **options(**VERIFY)}),
        ("top_k", {"top_k": value, "temperature": 1, **options(nbdiff_mode="ar")}),
        ("min_tokens", {"min_tokens": value}),
        ("max_tokens", {"max_tokens": value}),
        ("logprobs", {"logprobs": value}),
        ("priority", {"priority": value}),
        ("stream_interval", {"stream_interval": value, "stream": True}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": value}),
        ("stop_token_ids", {"stop_token_ids": [value]}),
        ("allowed_token_ids", {"allowed_token_ids": [value]}),
        ("logit_bias", {"logit_bias": {str(value): 1.0}}),
        ("prompt", {"prompt": [value]}),
    ]


COUNTS = [case for value in POWERS for case in counts(value)]
MORE_COUNTS = [case for value in MORE_POWERS for case in counts(value)]
BEYOND: list[Case] = [  # what the transport to the engine cannot carry
    ("extra_args", options(diffusion_max_steps=2**64)),
    ("extra_args", options(**VERIFY, nbdiff_draft_steps=-(2**64))),
    ("top_k", {"top_k": 2**64, "temperature": 1}),
    ("seed", {"seed": 2**64, "temperature": 1}),
    ("min_tokens", {"min_tokens": 2**64}),
    ("max_tokens", {"max_tokens": 2**64}),
    ("priority", {"priority": 2**64}),
    ("stream_interval", {"stream_interval": 2**64, "stream": True}),
    ("stop_token_ids", {"stop_token_ids": [2**64]}),
    ("allowed_token_ids", {"allowed_token_ids": [2**64]}),
    ("repetition_detection", {"repetition_detection": {"max_pattern_size": 2**64, "min_count": 2}}),
]


def seeds(value: int) -> list[Case]:
    """One seed of one and of two completions."""
    return [
        ("seed", {"seed": value, "n": n, "temperature": 1, **xargs})
        for n in (1, 2)
        for xargs in ({}, options(**VERIFY))
    ]


SEEDS = [*seeds(2**63 - 1), *seeds(2**63)]
MORE_SEEDS = [case for value in (2**63 - 2, 2**32 - 1, -1, -(2**63)) for case in seeds(value)]
FLOATS: list[Case] = [
    *(
        ("nbdiff_threshold", options(nbdiff_threshold=v))
        for v in (math.nan, math.inf, 5e-324, 1e308)
    ),
    *(("temperature", {"temperature": v}) for v in (math.nan, math.inf, 5e-324, 1e-45, -0.0)),
    *(("top_p", {"top_p": v, "temperature": 1}) for v in (math.nan, 5e-324, 1e-45, 0)),
    *(("min_p", {"min_p": v, "temperature": 1}) for v in (math.nan, 5e-324, 1.0)),
    *(("repetition_penalty", {"repetition_penalty": v}) for v in (math.nan, 5e-324, 1e-38, 3.5e38)),
    *(("logit_bias", {"logit_bias": {"5": v}}) for v in (math.nan, math.inf, -math.inf, 1e308)),
]
LISTS: list[Case] = [
    ("stop_token_ids", {"stop_token_ids": list(range(20_000))}),
    ("stop_token_ids", {"stop_token_ids": [5] * 20_000}),
    ("allowed_token_ids", {"allowed_token_ids": [5] * 20_000}),
    ("bad_words", {"bad_words": words(128, 400)}),
    ("bad_words", {"bad_words": words(64, 200), "max_tokens": 300, "ignore_eos": True}),
    ("bad_words", {"bad_words": words(1, 20_000)}),
    ("bad_words", {"bad_words": [str(i) for i in range(20_000)]}),
    ("logit_bias", {"logit_bias": {str(i): 1.0 for i in range(20_000)}}),
]
BROKEN_TEXTS: list[Case] = [  # half a surrogate pair, which JSON can write and UTF-8 cannot
    ("stop", {"stop": "\ud800"}),
    ("bad_words", {"bad_words": ["\ud800"]}),
    ("request_id", {"request_id": "\ud800"}),
    ("session_id", {"session_id": "\ud800"}),
    ("cache_salt", {"cache_salt": "\ud800"}),
    ("vllm_xargs", options(**{"\ud800": 1})),
    ("vllm_xargs", options(key="\ud800")),
    ("kv_transfer_params", {"kv_transfer_params": {"key": "\ud800"}}),
    ("ec_transfer_params", {"ec_transfer_params": {"key": ["\ud800"]}}),
    ("prompt", {"prompt": "\ud800"}),
]
WRONG_TYPES: list[Case] = [
    ("structured_outputs", {"structured_outputs": 5}),
    ("structured_outputs", {"structured_outputs": ["regex"]}),
    ("structured_outputs", {"structured_outputs": [None]}),
]
GRAMMARS: list[Case] = [  # each is compiled or refused in time
    ("structured_outputs", {"structured_outputs": wanted})
    for wanted in (
        {"grammar": "root ::= ("},
        {"grammar": 'root ::= root root | "a" | ""'},
        {"grammar": 'root ::= "a" root'},
        {"regex": "(a*)*b"},
        {"regex": "((a{1,200}){1,200}){1,200}"},
        {"regex": "("},
        {"regex": "x" * (1 << 17)},
        {"choice": [""]},
        {"choice": []},
        {"json": {"type": "what"}},
        {"json": "{"},
        {"json": {"enum": list(range(5000))}},
        {"json": {"$ref": "#"}},
        {"json": {"type": "object", "properties": {f"k{i}": {} for i in range(500)}}},
        {"structural_tag": "{}"},
        {"json_object": False},
    )
]
UNSUPPORTED: list[Case] = [
    ("use_beam_search", {"use_beam_search": True}),
    ("use_beam_search", {"use_beam_search": True, "n": 4, "stream": True}),
    ("watermarking", {"watermarking": True}),
    (
        "structured_outputs",
        {"structured_outputs": {"choice": ["a"]}, "temperature": 0}
        | options(nbdiff_algorithm="freedave"),
    ),
    ("thinking_token_budget", {"thinking_token_budget": 5}),
]
LATE: list[Case] = [  # what vLLM refuses only when the first output is awaited
    ("stop_token_ids", {"stop_token_ids": [values.VOCAB_SIZE]}),
    ("routed_experts_prompt_start", {"routed_experts_prompt_start": 1000}),
    ("prompt", {"prompt": [values.VOCAB_SIZE]}),
]
NOTHING_LEFT: list[Case] = [
    (name, {**ask, "temperature": temperature, **options(nbdiff_mode=mode)})
    for name, ask in (
        ("min_tokens", {"allowed_token_ids": [values.EOS_ID], "min_tokens": 8}),
        ("min_tokens", {"stop_token_ids": list(range(values.VOCAB_SIZE)), "min_tokens": 8}),
        ("bad_words", {"allowed_token_ids": [ONLY], "bad_words": [ONLY_TEXT]}),
    )
    for temperature in (0, 1)
    for mode in ("diffusion", "verify", "ar")
]
UNKNOWN: list[Case] = [
    (key, options(**{key: value}))
    for key, value in (
        ("threshold", 0.1),
        ("mode", "ar"),
        ("max_steps", 2),
        ("algorithm", "margin"),
    )
]


CHAT: dict[str, Any] = {
    "model": NAME,
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 8,
}


def identity(case: Case) -> str:
    """A short name of a case."""
    name, ask = case
    return f"{name}-{ask}"[:100]


@pytest.mark.parametrize(
    "case",
    [
        *COUNTS,
        *BEYOND,
        *SEEDS,
        *FLOATS,
        *LISTS,
        *GRAMMARS,
        *(pytest.param(case, marks=pytest.mark.long) for case in (*MORE_COUNTS, *MORE_SEEDS)),
    ],
    ids=identity,
)
def test_is_served_or_refused_by_name(
    keeper: Keeper, expected: list[exchange.Texts], case: Case
) -> None:
    """HTTP 200, or 400 naming the field; the server lives and others' answers are unchanged."""
    name, ask = case
    call = Call("/v1/completions", exchange.ASK | {"temperature": 0, "max_tokens": 8} | ask)
    (answer,), wrong = exchange.send(keeper.server(), [call], expected)
    assert not wrong, keeper.report(wrong)
    assert answer.status == 200 or name in answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "case",
    [*BROKEN_TEXTS, *WRONG_TYPES, *UNSUPPORTED, *LATE, *NOTHING_LEFT, *UNKNOWN],
    ids=identity,
)
def test_is_refused_by_name(server: Server, case: Case, stream: bool) -> None:
    """With HTTP 400, for a stream as well; nothing is ignored."""
    name, ask = case
    call = Call("/v1/completions", exchange.ASK | {"stream": stream} | ask)
    (answer,) = exchange.answers(server, [call])
    assert answer.status == 400 and name in answer.text


CHATS: list[Case] = [
    ("messages", {"messages": 5}),
    ("messages", {"messages": "hello"}),
    ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}),
    ("use_beam_search", {"use_beam_search": True, "stream": True}),
    ("structured_outputs", {"structured_outputs": 5}),
    ("watermarking", {"watermarking": True}),
]


@pytest.mark.parametrize("case", CHATS, ids=identity)
def test_chat_is_refused_by_name(server: Server, case: Case) -> None:
    name, ask = case
    (answer,) = exchange.answers(server, [Call("/v1/chat/completions", CHAT | ask)])
    assert answer.status == 400 and name in answer.text


def test_chat_echoes(server: Server) -> None:
    """`echo` alone asks for no logprobs."""
    (answer,) = exchange.answers(server, [Call("/v1/chat/completions", CHAT | {"echo": True})])
    assert answer.status == 200


def test_priority_header_is_bounded(server: Server) -> None:
    """It goes to the engine as the field does, which vLLM bounds."""
    headers = {"X-Vllm-Priority": str(2**64)}
    response = httpx.post(
        f"{server.url}/v1/completions", json=exchange.ASK, headers=headers, timeout=exchange.LIMIT
    )
    assert response.status_code == 400 and "priority" in response.text


def test_large_top_k_is_all_tokens(server: Server) -> None:
    """A count beyond 32 bits does not wrap: 2^32 + 1 is not the likeliest token only."""
    ask = exchange.ASK | {"temperature": 1.5, "seed": 3, "ignore_eos": True, "max_tokens": 48}
    calls = [
        Call("/v1/completions", ask | {"top_k": top_k})
        for top_k in (0, values.VOCAB_SIZE, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63)
    ]
    unlimited, *others = map(exchange.texts, exchange.answers(server, calls))
    assert others == [unlimited] * len(others)
