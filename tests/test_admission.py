# SPDX-License-Identifier: Apache-2.0
"""Admission: every number, list and string of a request is bounded, and refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.test_request import FREEDAVE, MASK, VOCAB, config
from vllm_nbdiff import admission
from vllm_nbdiff.admission import clamp, validate_envelope, validate_request
from vllm_nbdiff.limits import MAX_GRAMMAR_CHARACTERS, MIN_TOP_P, RANGES

MAX_MODEL_LEN = 64
# Around the ends of every integer type that a value may be stored in.
INTEGERS = sorted(
    {
        sign * (1 << bits) + near
        for bits in (0, 8, 15, 16, 31, 32, 62, 63, 64, 65)
        for sign in (1, -1)
        for near in (-1, 0, 1)
    }
)
WRONG = [None, True, 0.5, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, "1", [1], {}]
OPTIONS = (
    "nbdiff_threshold",
    "nbdiff_small_blocks",
    "nbdiff_block_length",
    "nbdiff_draft_length",
    "nbdiff_draft_steps",
    "nbdiff_fused_commit",
    "nbdiff_block_cache",
    "nbdiff_mode",
    "nbdiff_algorithm",
    "diffusion_max_steps",
)


def refused(params: SamplingParams, prompt: list[int] | None = None) -> str | None:
    """The parameter that admission names when it refuses, or None."""
    try:
        validate_request(params, [1, 2] if prompt is None else prompt, config())
    except VLLMValidationError as error:
        assert error.parameter is not None and error.parameter in str(error)
        return error.parameter
    return None


def changed(name: str, value: Any, **others: Any) -> SamplingParams:
    """Parameters with one field set past vLLM's own check."""
    params = SamplingParams(**others)
    setattr(params, name, value)
    return params


def admitted(params: SamplingParams) -> SamplingParams | None:
    """What a worker gets of `params`, which change, after admission and vLLM's transport.

    None if they are refused.
    """
    if refused(params) is not None:
        return None
    if params.max_tokens is None:
        params.max_tokens = MAX_MODEL_LEN - 2
    clamp(params, config(), MAX_MODEL_LEN)
    return MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))


@pytest.mark.parametrize("name", [*RANGES, "seed"])
def test_numbers_that_are_admitted_fit_the_worker(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a number is set to, it is refused by its name or has a value that workers hold."""
    # vLLM's limit of `n`; ours is the type's.
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", str(1 << 31))
    for value in (*INTEGERS, *WRONG):
        params = admitted(changed(name, value, max_tokens=8))
        if params is None:
            assert refused(changed(name, value)) == name
            continue
        limits = {"top_k": VOCAB, "max_tokens": MAX_MODEL_LEN, "min_tokens": MAX_MODEL_LEN}
        low, high = (-(1 << 63), (1 << 63) - 1) if name == "seed" else (-2, 1 << 31)
        admitted_value = getattr(params, name)
        assert admitted_value is None or low <= admitted_value <= limits.get(name, high)


@pytest.mark.parametrize("key", OPTIONS)
def test_options_are_refused_by_name_or_fit_the_worker(key: str) -> None:
    for value in (*INTEGERS, *WRONG):
        for extra in ({}, FREEDAVE, {"nbdiff_mode": "verify"}, {"nbdiff_mode": "ar"}):
            params = changed("extra_args", {**extra, key: value}, temperature=0)
            name = refused(params)
            if name is None:
                assert isinstance(value, int | float) and 0 <= value <= 1e6
            else:
                assert name.startswith(("nbdiff_", "diffusion_"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("diffusion_max_steps", 1 << 63),
        ("nbdiff_draft_steps", 1 << 63),
        ("nbdiff_draft_steps", (1 << 32) + 5),
        ("nbdiff_threshold", float("nan")),
        ("nbdiff_threshold", float("inf")),
        ("nbdiff_threshold", 1e308),
    ],
)
def test_options_beyond_every_use(key: str, value: Any) -> None:
    mode = {"nbdiff_mode": "verify"} if key == "nbdiff_draft_steps" else {}
    algorithm = {"nbdiff_algorithm": "factor"} if key == "nbdiff_threshold" else {}
    assert refused(SamplingParams(extra_args={**mode, **algorithm, key: value})) == key


def test_the_last_seed_of_parallel_completions() -> None:
    """vLLM gives completion i the seed `seed + i`."""
    last = (1 << 63) - 1
    assert refused(SamplingParams(seed=last)) is None
    assert refused(SamplingParams(seed=last, n=2)) == "seed"
    assert refused(SamplingParams(seed=last - 1, n=2)) is None
    assert refused(SamplingParams(seed=-(1 << 63), n=2)) is None
    assert refused(SamplingParams(seed=-(1 << 63) - 1)) == "seed"


def test_values_without_effect_are_clamped() -> None:
    """`top_k` of 2^32 + 5 is not 5."""
    params = SamplingParams(top_k=(1 << 32) + 5, top_p=1e-300, max_tokens=1 << 63, min_tokens=1)
    params = admitted(params) or params
    assert (params.top_k, params.top_p) == (VOCAB, MIN_TOP_P)
    assert (params.max_tokens, params.min_tokens) == (MAX_MODEL_LEN, 1)
    plain = admitted(SamplingParams(top_k=7, top_p=0.5, max_tokens=9, min_tokens=2))
    assert plain is not None
    assert (plain.top_k, plain.top_p, plain.max_tokens, plain.min_tokens) == (7, 0.5, 9, 2)


@pytest.mark.parametrize("value", [-1, VOCAB, 1 << 31, 1 << 63, True, 1.0, "1", None])
def test_token_ids_are_of_the_vocabulary(value: Any) -> None:
    assert refused(changed("stop_token_ids", [3, value])) == "stop_token_ids"
    assert refused(changed("allowed_token_ids", [3, value])) == "allowed_token_ids"
    assert refused(changed("logit_bias", {3: 1.0, value: 1.0})) == "logit_bias"
    assert refused(changed("_bad_words_token_ids", [[3], [4, value]])) == "bad_words"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308, True, "1"])
def test_biases_are_finite(value: Any) -> None:
    assert refused(changed("logit_bias", {3: 1.0, 4: value})) == "logit_bias"


def long_list(size: int) -> list[int]:
    return [i % MASK for i in range(size)]


@pytest.mark.parametrize(
    ("name", "make", "limit"),
    [
        ("stop_token_ids", long_list, 10_000),
        ("allowed_token_ids", long_list, 1024),
        ("stop", lambda n: ["x"] * n, 256),
        ("bad_words", lambda n: ["x" * n], 1 << 16),
        ("_bad_words_token_ids", lambda n: [[1]] * n, 128),
        ("_bad_words_token_ids", lambda n: [long_list(64)] * 15 + [long_list(n - 960)], 1024),
    ],
)
def test_lists_are_bounded(name: str, make: Callable[[int], Any], limit: int) -> None:
    assert refused(changed(name, make(limit))) is None
    named = "bad_words" if "bad_words" in name else name
    assert refused(changed(name, make(limit + 1))) == named


def test_number_of_biases_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_LOGIT_BIASES", 3)
    assert refused(SamplingParams(logit_bias=dict.fromkeys(range(3), 1.0))) is None
    assert refused(SamplingParams(logit_bias=dict.fromkeys(range(4), 1.0))) == "logit_bias"


def test_limits_of_bad_words_are_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    params = changed("_bad_words_token_ids", [[1, 2], [3]])
    monkeypatch.setenv("VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", "2")
    assert refused(params) == "bad_words"
    monkeypatch.setenv("VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", "3")
    monkeypatch.setenv("VLLM_MAX_NUM_BAD_WORDS", "1")
    assert refused(params) == "bad_words"
    monkeypatch.setenv("VLLM_MAX_NUM_BAD_WORDS", "2")
    assert refused(params) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_pattern_size": 1 << 63, "min_count": 2},
        {"max_pattern_size": 257, "min_count": 2},
        {"max_pattern_size": 8, "min_count": 1 << 63},
        {"max_pattern_size": 256, "min_count": 9},
    ],
)
def test_repetition_detection_is_bounded(arguments: dict[str, Any]) -> None:
    fine = RepetitionDetectionParams(max_pattern_size=256, min_count=2)
    assert refused(SamplingParams(repetition_detection=fine)) is None
    bad = RepetitionDetectionParams(**arguments)
    assert refused(SamplingParams(repetition_detection=bad)) == "repetition_detection"


@pytest.mark.parametrize("name", admission._FLAGS)
def test_flags_are_flags(name: str) -> None:
    assert refused(changed(name, 1)) == name
    assert refused(changed(name, True)) is None


def test_prompt_is_of_the_vocabulary() -> None:
    assert refused(SamplingParams(), [1, VOCAB]) == "prompt"
    assert refused(SamplingParams(), [1, -1]) == "prompt"
    assert refused(SamplingParams(), [1, VOCAB - 1]) is None


def test_mask_token_in_the_prompt() -> None:
    with pytest.raises(VLLMValidationError, match="mask token"):
        validate_request(SamplingParams(), [1, MASK, 2], config())
    validate_request(SamplingParams(), [1, 2], config())


def test_only_the_mask_token_allowed() -> None:
    assert refused(SamplingParams(allowed_token_ids=[MASK])) == "allowed_token_ids"
    assert refused(SamplingParams(allowed_token_ids=[MASK, 8])) is None


def banned(*words: list[int], **arguments: Any) -> str | None:
    """What is named where these words are bad."""
    return refused(changed("_bad_words_token_ids", list(words), **arguments))


def test_some_token_is_left() -> None:
    every = list(range(VOCAB))
    assert banned([8], allowed_token_ids=[8, MASK]) == "bad_words"
    assert banned([8], allowed_token_ids=[8, 9]) is None
    assert banned([8, 8], [8, 3], allowed_token_ids=[8]) is None
    assert refused(SamplingParams(stop_token_ids=every, min_tokens=1)) == "min_tokens"
    assert refused(SamplingParams(stop_token_ids=every)) is None
    assert refused(SamplingParams(stop_token_ids=every[:-1], min_tokens=1)) is None
    assert banned([VOCAB - 1], stop_token_ids=every[:-1], min_tokens=1) == "min_tokens"
    allowed = {"allowed_token_ids": [8, 9], "stop_token_ids": [9]}
    assert banned([8], **allowed) is None
    assert banned([8], **allowed, min_tokens=1) == "min_tokens"


@pytest.mark.parametrize("half", ["\ud800", "\udc00\ud800", "a" * 99 + "\udfff"])
@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("stop", lambda half: [half]),
        ("bad_words", lambda half: ["fine", half]),
        ("extra_args", lambda half: {"kv_transfer_params": {"a": [half]}}),
        ("extra_args", lambda half: {"kv_transfer_params": [{half: 1}]}),
        ("extra_args", lambda half: {half: 1}),
    ],
)
def test_half_of_a_surrogate_pair(name: str, wrap: Callable[[str], Any], half: str) -> None:
    """What UTF-8 cannot hold is refused by a message that it can hold."""
    with pytest.raises(VLLMValidationError, match=f"{name} holds half") as error:
        validate_request(changed(name, wrap(half)), [1], config())
    str(error.value).encode()


def test_texts_of_any_language() -> None:
    texts = ["\U0001f9d1\u200d\U0001f680", "\u0645\u0631", "\x00", "\ufffd"]
    assert refused(changed("stop", texts)) is None


def test_envelope() -> None:
    validate_envelope(-(1 << 63), request_id="a", session_id=None)
    with pytest.raises(VLLMValidationError, match="session_id holds half"):
        validate_envelope(0, request_id="a", session_id="\ud800")
    for priority in (1 << 63, -(1 << 63) - 1, 0.5, True):
        with pytest.raises(VLLMValidationError, match="priority must be"):
            validate_envelope(priority)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("logprob_token_ids", {"logprob_token_ids": [-1]}),
        ("logprob_token_ids", {"logprob_token_ids": ["1"]}),
        ("watermarking", {"watermarking": True}),
    ],
)
def test_unsupported_parameters_are_refused_by_name(name: str, arguments: dict[str, Any]) -> None:
    assert refused(SamplingParams(**arguments)) == name


@pytest.mark.parametrize(
    ("wanted", "others"),
    [
        ({"regex": "a" * MAX_GRAMMAR_CHARACTERS}, {}),
        ({"choice": ["\ud800"]}, {}),
        ({"json": {"\ud800": 1}}, {}),
        ({"choice": ["a"]}, {"extra_args": {"nbdiff_algorithm": "freedave"}, "temperature": 0}),
    ],
)
def test_grammars_are_bounded(wanted: dict[str, Any], others: dict[str, Any]) -> None:
    structured = StructuredOutputsParams(**wanted)
    assert refused(SamplingParams(structured_outputs=structured, **others)) == "structured_outputs"
    assert refused(SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"]))) is None
    assert refused(changed("structured_outputs", wanted)) == "structured_outputs"


def test_extra_args_that_are_no_object() -> None:
    assert refused(changed("extra_args", ["nbdiff_threshold"])) == "extra_args"


@pytest.mark.parametrize("backend", ["outlines", "lm-format-enforcer", "xgrammar", "guidance"])
def test_grammars_of_backends_that_can_go_back(backend: str) -> None:
    """vLLM chooses one for a request before the second look at its parameters."""
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"]))
    assert params.structured_outputs is not None
    params.structured_outputs._backend = backend
    supported = backend in ("xgrammar", "guidance")
    assert refused(params) == (None if supported else "structured_outputs")
