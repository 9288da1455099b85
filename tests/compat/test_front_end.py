# SPDX-License-Identifier: Apache-2.0
"""Admission: requests are checked when they arrive.

A test named `test_..._is_needed` that fails means that the patch can go.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from tests.compat.conftest import stock
from tests.conftest import MASK


@pytest.fixture(scope="module")
def input_processor(served: VllmConfig) -> InputProcessor:
    return InputProcessor(served)


def test_admission_patch_is_needed(input_processor: InputProcessor) -> None:
    """vLLM alone admits the mask token and an option of ours that is none."""
    arguments = ({"prompt_token_ids": [1, MASK]}, SamplingParams(), ("generate",))
    request = stock(InputProcessor, "process_inputs")(input_processor, "0", *arguments)
    assert request.prompt_token_ids == [1, MASK]
    with pytest.raises(VLLMValidationError, match="mask token"):
        input_processor.process_inputs("0", *arguments)


def test_the_engines_copy_is_clamped(input_processor: InputProcessor) -> None:
    """What the caller holds stays as it is."""
    params = SamplingParams(top_k=(1 << 32) + 5, max_tokens=1 << 63)
    prompt = {"prompt_token_ids": [1, 2]}
    request = input_processor.process_inputs("0", prompt, params, ("generate",))
    assert request.sampling_params is not None
    assert (request.sampling_params.top_k, request.sampling_params.max_tokens) == (512, 512)
    assert (params.top_k, params.max_tokens) == ((1 << 32) + 5, 1 << 63)


RENDERED = {"type": "token", "prompt_token_ids": [1, 2]}
LATE: dict[str, tuple[SamplingParams, dict[str, Any]]] = {
    "nbdiff_threshold": (SamplingParams(extra_args={"nbdiff_threshold": -1}), {}),
    "stop_token_ids": (SamplingParams(stop_token_ids=[512]), {}),
    "routed_experts_prompt_start": (SamplingParams(routed_experts_prompt_start=3), {}),
    "logprob_token_ids": (SamplingParams(logprob_token_ids=[512]), {}),
    "data_parallel_rank": (SamplingParams(), {"data_parallel_rank": 7}),
    "session_id": (SamplingParams(), {"session_id": "\ud800"}),
    "priority": (SamplingParams(), {"priority": 1 << 63}),
}


@pytest.mark.parametrize("name", LATE)
def test_streaming_patch_is_needed(input_processor: InputProcessor, name: str) -> None:
    """vLLM's own `generate` runs nothing before its first output is awaited."""
    engine = SimpleNamespace(
        input_processor=input_processor, vllm_config=input_processor.vllm_config
    )
    params, options = LATE[name]
    arguments = (RENDERED, params, "0")
    stock(AsyncLLM, "generate")(engine, *arguments, **options)
    with pytest.raises(VLLMValidationError, match=name):
        AsyncLLM.__dict__["generate"](engine, *arguments, **options)
    AsyncLLM.__dict__["generate"](engine, RENDERED, SamplingParams(), "0", priority=0)


def test_streaming_patch_of_responses_is_needed(input_processor: InputProcessor) -> None:
    serving = SimpleNamespace(engine_client=SimpleNamespace(input_processor=input_processor))
    name, arguments = "_generate_with_builtin_tools", ("0", RENDERED, LATE["stop_token_ids"][0])
    stock(OpenAIServingResponses, name)(serving, *arguments, context=None)
    respond = OpenAIServingResponses.__dict__[name]
    with pytest.raises(VLLMValidationError, match="stop_token_ids"):
        respond(serving, *arguments, context=None)
    respond(serving, "0", RENDERED, SamplingParams(), context=None, priority=0)


def tokenizer(encode: Any) -> SimpleNamespace:
    return SimpleNamespace(encode=encode, max_token_id=511)


def test_bad_words_are_refused_by_their_tokens(
    input_processor: InputProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without changing the caller's parameters."""
    codes = tokenizer(lambda text, add_special_tokens: [ord(c) % 100 for c in text])
    monkeypatch.setattr(InputProcessor, "tokenizer", codes)
    words = [chr(ord("a") + i) * 60 for i in range(20)]
    arguments = ("0", RENDERED, SamplingParams(bad_words=words[:8]), ("generate",))
    assert input_processor.process_inputs(*arguments).sampling_params is not None
    params = SamplingParams(bad_words=words)
    with pytest.raises(VLLMValidationError, match="1024 tokens") as error:
        input_processor.process_inputs("0", RENDERED, params, ("generate",))
    assert error.value.parameter == "bad_words" and params.bad_words_token_ids is None


@pytest.mark.parametrize("words", [["x" * (1 << 17)], ["\ud800"]], ids=["long", "broken"])
def test_bad_words_are_refused_before_they_are_tokenized(
    input_processor: InputProcessor, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def encode(text: str, add_special_tokens: bool) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(InputProcessor, "tokenizer", tokenizer(encode))
    params = SamplingParams(bad_words=words)
    with pytest.raises(VLLMValidationError, match="bad_words"):
        input_processor.process_inputs("0", RENDERED, params, ("generate",))


def test_watermarking_is_refused(input_processor: InputProcessor) -> None:
    """vLLM alone turns it off with a warning."""
    arguments = ("0", RENDERED, SamplingParams(watermarking=True), ("generate",))
    request = stock(InputProcessor, "process_inputs")(input_processor, *arguments)
    assert request.sampling_params.watermarking is False
    with pytest.raises(VLLMValidationError, match="watermarking"):
        input_processor.process_inputs(*arguments)


def test_stop_ids_of_the_model_count(
    input_processor: InputProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known once vLLM has read the model's generation config."""
    eos = 7
    monkeypatch.setattr(input_processor, "generation_config_fields", {"eos_token_id": eos})
    params = SamplingParams(allowed_token_ids=[eos], min_tokens=2)
    with pytest.raises(VLLMValidationError, match="min_tokens leaves no token"):
        input_processor.process_inputs("0", RENDERED, params, ("generate",))


def test_naming_grammars_is_needed() -> None:
    """Stock vLLM names no field when it refuses one."""
    params = SamplingParams(structured_outputs=StructuredOutputsParams(grammar="root ::= ("))
    served = SimpleNamespace(is_diffusion=False)
    arguments = (served, StructuredOutputsConfig(backend="xgrammar"), object())
    with pytest.raises(VLLMValidationError) as plain:
        stock(SamplingParams, "_validate_structured_outputs")(params, *arguments)
    assert plain.value.parameter is None and "structured_outputs" not in str(plain.value)
    with pytest.raises(VLLMValidationError, match="structured_outputs: Invalid grammar") as named:
        params._validate_structured_outputs(*arguments)
    assert named.value.parameter == "structured_outputs"
