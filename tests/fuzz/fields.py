# SPDX-License-Identifier: Apache-2.0
"""What each field of a request may hold: values that its documentation allows, and others.

A field of vLLM's request models that `FAIR` does not name gets values by its type; one whose type
has none here raises LookupError, so that a new field is covered or seen.
"""

from __future__ import annotations

import functools
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from tests.fuzz import values
from vllm_nbdiff.decoding.rules import RULES
from vllm_nbdiff.request_options import MODES

MODELS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatCompletionRequest}
"""The request model of each endpoint."""

QUESTION = "Anna has 7 pens, finds 4 more and gives 2 to Ben. How many pens does Anna have now?"
MODEL_LENGTH = 512  # of the server
MOST_CHOICES = 16384
"""vLLM's limit of `n`; it serves as many as are asked for, so that a body asks for few or more."""

_json_schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
_tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_words = st.lists(st.sampled_from(("so", "=", " Then", "Answer", "7")), min_size=1, max_size=4)
_biases = st.one_of(
    st.dictionaries(values.ids.map(str), st.sampled_from((-100.0, -1.0, 2.0, 100.0)), max_size=4),
    st.sampled_from((-100.0, 100.0)).map(lambda b: {str(i): b for i in range(values.VOCAB_SIZE)}),
)
_prompts = st.one_of(
    st.just(f"<|user|>{QUESTION}<|assistant|>"),
    st.sampled_from((1, 2, 31, 32, 33, MODEL_LENGTH - 33, MODEL_LENGTH - 1)).map(lambda n: [5] * n),
    st.lists(st.just(QUESTION), min_size=1, max_size=3),
    st.lists(st.lists(values.ids, min_size=1, max_size=40), min_size=1, max_size=3),
    values.texts,
)
_contents = st.one_of(
    st.just(QUESTION),
    values.texts,
    st.just([{"type": "text", "text": QUESTION}]),
)
_users = st.sampled_from(("user", "user", "user", "assistant"))
_talks = st.one_of(
    _contents.map(lambda content: [{"role": "user", "content": content}]),
    st.lists(st.fixed_dictionaries({"role": _users, "content": _contents}), max_size=3),
)

FAIR: dict[str, st.SearchStrategy[Any]] = {
    "model": st.none(),
    "prompt": _prompts,
    "messages": _talks,
    "max_tokens": st.integers(1, 40),
    "max_completion_tokens": st.integers(1, 40),
    "min_tokens": st.integers(0, 12),
    "n": st.integers(1, 8),
    "temperature": st.sampled_from((0, 1e-6, 0.01, 0.7, 1, 1.0, 2)),
    "top_p": st.sampled_from((1e-9, 0.1, 0.8, 1)),
    "top_k": st.sampled_from((-1, 0, 1, 20, values.VOCAB_SIZE, values.VOCAB_SIZE + 1)),
    "min_p": st.sampled_from((0, 1e-9, 0.05, 1)),
    "seed": st.sampled_from((-1, 0, 7, 2**31, 2**32 + 5, 2**63 - 1, -(2**63))),
    "frequency_penalty": st.sampled_from((-2, 0, 0.4, 2)),
    "presence_penalty": st.sampled_from((-2, 0, 0.4, 2)),
    "repetition_penalty": st.sampled_from((1e-3, 0.5, 1, 1.3, 1e3)),
    "stop": st.one_of(st.just("Answer"), _words),
    "stop_token_ids": values.id_lists,
    "allowed_token_ids": values.id_lists,
    "bad_words": _words,
    "logit_bias": _biases,
    "logprobs": st.sampled_from((None, 0, 1, 5)),
    "priority": st.just(0),
    "truncate_prompt_tokens": st.sampled_from((-1, 1, 5, 31, 32, 400)),
    "stream_interval": st.sampled_from((1, 2, 100)),
    "stream_options": st.sampled_from(({"include_usage": True}, {"continuous_usage_stats": True})),
    "length_penalty": st.sampled_from((0.5, 1, 2)),
    "thinking_token_budget": st.sampled_from((None, -1, 0, 5)),
    "repetition_detection": st.sampled_from(
        ({"max_pattern_size": 4, "min_count": 2}, {"max_pattern_size": 0})
    ),
    "response_format": st.sampled_from(({"type": "text"}, {"type": "json_object"}, _json_schema)),
    "structured_outputs": st.sampled_from(({"choice": ["a", "b"]}, {"regex": "[0-9]+"})),
    "prompt_embeds": values.texts,
    "tools": st.sampled_from(([], [_tool])),
    "tool_choice": st.sampled_from(("none", "auto", "required", _tool)),
    "use_beam_search": st.booleans(),
}

HONOURED = (
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "min_p",
    "min_tokens",
    "n",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "top_k",
    "top_p",
)
"""Fields that change what is generated; the others are refused or change how it is returned."""

_common_options: dict[str, st.SearchStrategy[Any]] = {"nbdiff_step_map": st.integers(0, 1)}
_draft_options: dict[str, st.SearchStrategy[Any]] = {
    "nbdiff_algorithm": st.sampled_from(sorted(RULES)),
    "nbdiff_threshold": st.sampled_from((0, 0.1, 0.5, 0.9, 1, 1.0)),
}
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "diffusion": {
        **_common_options,
        **_draft_options,
        "nbdiff_block_length": st.sampled_from((1, 2, 8, 12, 32)),
        "nbdiff_small_blocks": st.sampled_from((1, 2, 4, 8, 32)),
        "nbdiff_fused_commit": st.integers(0, 1),
        "nbdiff_block_cache": st.integers(0, 1),
        "diffusion_max_steps": st.sampled_from((1, 4, 32, 1000)),
        "nbdiff_draft_steps": st.integers(1, 40),
        "nbdiff_editing_threshold": st.sampled_from((0, 0.5, 1)),
        "nbdiff_max_post_steps": st.integers(0, 40),
    },
    "verify": {
        **_common_options,
        **_draft_options,
        "nbdiff_draft_length": st.sampled_from((1, 2, 16, 32)),
        "nbdiff_fan_out": st.sampled_from((0, 1, 4, 32)),
        "nbdiff_draft_steps": st.integers(1, 40),
        "nbdiff_fused_commit": st.integers(0, 1),
    },
    "ar": _common_options,
    "auto": _common_options,
}
"""Options that apply in each mode."""
assert set(OPTIONS) == set(MODES)
OPTION_NAMES = tuple(sorted({"nbdiff_mode", *(key for keys in OPTIONS.values() for key in keys)}))

_BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(0, 40),
    float: st.floats(0, 1),
    str: values.texts,
    list[int]: values.id_lists,
    list[str]: _words,
}
_EXTREME_BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: values.integers,
    float: values.floats | values.integers,
    str: values.texts,
    list[int]: values.lists_of(values.integers),
    list[str]: values.lists_of(values.texts),
}


def leaves(annotation: Any) -> list[Any]:
    """The types that a field accepts, without Annotated, unions and None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return leaves(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in leaves(part)]
    return [] if annotation is type(None) else [annotation]


def _of_leaf(leaf: Any) -> st.SearchStrategy[Any] | None:
    if get_origin(leaf) is Literal:
        return st.sampled_from(get_args(leaf))
    if get_origin(leaf) is dict:
        return st.dictionaries(st.sampled_from(("a", "text")), values.texts, max_size=2)
    if get_origin(leaf) is list and get_origin(get_args(leaf)[0]) is dict:
        return st.just([{"text": "x"}])
    return _BY_TYPE.get(leaf)


@functools.cache
def fair(path: str, name: str) -> st.SearchStrategy[Any]:
    """Values of a field that its documentation allows. Raises LookupError for an unknown type."""
    if name in FAIR:
        return FAIR[name]
    annotation = MODELS[path].model_fields[name].annotation
    found = [strategy for leaf in leaves(annotation) if (strategy := _of_leaf(leaf)) is not None]
    if not found:
        raise LookupError(f"{name} of {path} is {annotation}: give it values in `FAIR`")
    return st.one_of(found)


@functools.cache
def extreme(path: str, name: str) -> st.SearchStrategy[Any]:
    """Values of the right type that no documentation allows, as far as there are such."""
    if name == "logit_bias":
        keys = values.integers.map(str) | values.ids.map(str) | values.texts
        return st.dictionaries(keys, values.floats | values.integers, min_size=1, max_size=3)
    if name == "prompt":
        long = st.sampled_from((MODEL_LENGTH, MODEL_LENGTH + 1, 3000)).map(lambda n: [5] * n)
        return st.one_of(long, st.lists(values.integers, max_size=3), values.texts)
    found = [
        _EXTREME_BY_TYPE[leaf]
        for leaf in leaves(MODELS[path].model_fields[name].annotation)
        if leaf in _EXTREME_BY_TYPE
    ]
    if name == "n":
        return values.integers.filter(lambda n: not 8 < n <= MOST_CHOICES)
    return st.one_of(found) if found else values.anything


def hostile(path: str, name: str) -> st.SearchStrategy[Any]:
    """Values of any type."""
    return extreme(path, name) if name in ("n", "prompt") else values.anything
