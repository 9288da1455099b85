# SPDX-License-Identifier: Apache-2.0
"""Whole requests: what is posted where, and whether the client stays for the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz import fields, values
from tests.serving.server import NAME

UNPREFIXED = ("threshold", "mode", "max_steps", "diffusion_steps", "nbdiff_", "nbdiff_treshold")
"""Keys of `vllm_xargs` that are meant for us and are none of ours."""


@dataclass(frozen=True)
class Call:
    """One request over HTTP."""

    path: str
    body: Any
    leave_after: int | None = None
    """Close the connection after so many lines of the answer."""

    def payload(self) -> bytes:
        """What is posted: JSON with Python's NaN and Infinity."""
        return json.dumps(self.body).encode()

    def __str__(self) -> str:
        leave = "" if self.leave_after is None else f" leaving after {self.leave_after} lines"
        return f"POST {self.path}{leave}\n{self.payload().decode()}"


@st.composite
def _options(draw: st.DrawFn) -> dict[str, Any]:
    """`vllm_xargs` that are allowed, but for what algorithm and other options rule out together."""
    mode = draw(st.sampled_from(sorted(fields.OPTIONS)))
    options = draw(st.fixed_dictionaries({}, optional=fields.OPTIONS[mode]))
    return (
        options if mode == "diffusion" and draw(st.booleans()) else options | {"nbdiff_mode": mode}
    )


_hostile_options = st.one_of(
    st.tuples(st.sampled_from(fields.OPTION_NAMES), values.integers),
    st.tuples(st.sampled_from(fields.OPTION_NAMES), values.integers),
    st.tuples(st.sampled_from(fields.OPTION_NAMES), values.floats),
    st.tuples(st.sampled_from(fields.OPTION_NAMES), values.anything),
    st.tuples(st.sampled_from(UNPREFIXED), st.just(0.5)),
    st.tuples(values.texts, values.integers),
)

# How often a body has one thing that is hostile, and what.
_hostility = st.sampled_from(
    (*["nothing"] * 6, *["extreme"] * 4, *["option"] * 3, "field", "model")
)


@st.composite
def _bodies(draw: st.DrawFn, path: str) -> dict[str, Any]:
    """Some fields as documented, our options, and often one thing that is hostile."""
    names = sorted(set(fields.MODELS[path].model_fields) - {"model", "vllm_xargs"})
    asked = "prompt" if path == "/v1/completions" else "messages"
    chosen = draw(st.lists(st.sampled_from(fields.HONOURED), max_size=5, unique=True))
    if draw(st.booleans()):
        chosen.append(draw(st.sampled_from(names)))
    body: dict[str, Any] = {"model": NAME}
    for name in (asked, "max_tokens", "temperature", *chosen):
        body[name] = draw(fields.fair(path, name))
    if draw(st.booleans()):
        body["vllm_xargs"] = draw(_options())
    match draw(_hostility):
        case "extreme":
            name = draw(st.sampled_from((*fields.HONOURED, asked, "max_tokens", "temperature")))
            body[name] = draw(fields.extreme(path, name))
        case "option":
            key, value = draw(_hostile_options)
            body["vllm_xargs"] = {**body.get("vllm_xargs", {}), key: value}
        case "field":
            name = draw(st.sampled_from([*names, "vllm_xargs"]))
            body[name] = draw(fields.hostile(path, name))
        case "model":
            body["model"] = draw(values.texts)
    return body


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """A request to either endpoint; a few bodies are no objects, a few clients leave."""
    path = draw(st.sampled_from(sorted(fields.MODELS)))
    if draw(st.integers(0, 39)) == 0:
        return Call(path, draw(values.anything))
    body = draw(_bodies(path))
    leave_after = draw(st.none() | st.integers(0, 6)) if body.get("stream") is True else None
    return Call(path, body, leave_after)


def generate(number: int, seed_value: int) -> list[Call]:
    """The same requests for the same seed.

    Hypothesis mutates the examples of one run into each other; runs of their own keep them apart.
    """
    return [_draw(seed_value * 10**6 + i) for i in range(number)]


def _draw(seed_value: int) -> Call:
    made: list[Call] = []

    @seed(seed_value)
    @settings(
        max_examples=3,  # the first one is the simplest, the second one is close to it
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def collect(call: Call) -> None:
        made.append(call)

    collect()
    return made[-1]
