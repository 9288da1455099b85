# SPDX-License-Identifier: Apache-2.0
"""The fuzzer reaches every field and every option, and writes the same bodies for a seed."""

import json
from collections import Counter

import pytest

from tests.fuzz import bodies, fields
from vllm_nbdiff.request_options import OPTION_KEYS


@pytest.mark.parametrize("path", fields.MODELS)
def test_every_field_has_values(path: str) -> None:
    """A field of a type that the fuzzer does not know raises LookupError."""
    for name in fields.MODELS[path].model_fields:
        fields.fair(path, name)
        fields.extreme(path, name)


def test_every_option_has_values() -> None:
    assert set(fields.OPTION_NAMES) == set(OPTION_KEYS)


@pytest.mark.parametrize(
    ("number", "every_field"),
    [(400, False), pytest.param(2000, True, marks=pytest.mark.long)],
    ids=["short", "long"],
)
def test_bodies_reach_everything(number: int, every_field: bool) -> None:
    """Bodies are diverse; they send every option, and to each endpoint every field that is
    honoured. A long run sends every other field too."""
    calls = bodies.generate(number, 0)
    sent = {path: Counter[str]() for path in fields.MODELS}
    options = Counter[str]()
    for call in calls:
        if isinstance(call.body, dict):
            sent[call.path].update(list(call.body))
            xargs = call.body.get("vllm_xargs")
            options.update(list(xargs) if isinstance(xargs, dict) else ())
    for path, model in fields.MODELS.items():
        assert set(model.model_fields if every_field else fields.HONOURED) <= set(sent[path])
    assert set(OPTION_KEYS) <= set(options)
    assert len(set(map(str, calls))) > 0.95 * number
    assert any(call.leave_after is not None for call in calls)


def test_a_seed_gives_the_same_bodies() -> None:
    first, again, other = (bodies.generate(20, seed) for seed in (3, 3, 4))
    assert list(map(str, first)) == list(map(str, again)) != list(map(str, other))


def test_payload_is_what_is_replayed() -> None:
    """NaN, infinities and half surrogate pairs survive the way through JSON."""
    body = {"top_p": float("inf"), "prompt": "\ud800", "seed": 2**64}
    assert json.loads(bodies.Call("/v1/completions", body).payload()) == body
