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


def test_bodies_reach_everything() -> None:
    """A long run sends every field to each endpoint and every option, and bodies are diverse."""
    calls = bodies.generate(2000, 0)
    sent = {path: Counter[str]() for path in fields.MODELS}
    options = Counter[str]()
    for call in calls:
        if isinstance(call.body, dict):
            sent[call.path].update(list(call.body))
            xargs = call.body.get("vllm_xargs")
            options.update(list(xargs) if isinstance(xargs, dict) else ())
    for path, model in fields.MODELS.items():
        assert set(model.model_fields) <= set(sent[path])
    assert set(OPTION_KEYS) <= set(options)
    assert len(set(map(str, calls))) > 1900
    assert any(call.leave_after is not None for call in calls)


def test_a_seed_gives_the_same_bodies() -> None:
    first, again, other = (bodies.generate(20, seed) for seed in (3, 3, 4))
    assert list(map(str, first)) == list(map(str, again)) != list(map(str, other))


def test_payload_is_what_is_replayed() -> None:
    """NaN, infinities and half surrogate pairs survive the way through JSON."""
    body = {"top_p": float("inf"), "prompt": "\ud800", "seed": 2**64}
    assert json.loads(bodies.Call("/v1/completions", body).payload()) == body
