# SPDX-License-Identifier: Apache-2.0
"""Bodies that vLLM's own models of them misread.

A test named `test_..._is_needed` that fails means that the patch can go.
"""

from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from tests.compat.conftest import stock
from vllm_nbdiff.compat import bodies


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest])
@pytest.mark.parametrize("value", [5, ["regex"], [None]])
def test_body_patch_is_needed(model: Any, value: Any) -> None:
    """vLLM's own validator takes any value for an object."""
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(AttributeError):
        model.check_structured_outputs_count(body | {"structured_outputs": value})
    bodies.check_bodies()
    with pytest.raises(VLLMValidationError, match="structured_outputs must be an object"):
        model.model_validate(body | {"structured_outputs": value})
    bodies.check_bodies()
    assert model.model_validate(body).structured_outputs is None
    choice = model.model_validate(body | {"structured_outputs": {"choice": ["a"]}})
    assert choice.structured_outputs.choice == ["a"]


def test_echo_patch_is_needed() -> None:
    """vLLM alone asks for the prompt's logprobs."""

    def request(**fields: Any) -> ChatCompletionRequest:
        body = {"messages": [{"role": "user", "content": "x"}], "echo": True}
        return ChatCompletionRequest.model_validate(body | fields)

    bodies.echo_without_logprobs()
    convert = stock(ChatCompletionRequest, "to_sampling_params")
    assert convert(request(), 5, {}).prompt_logprobs == 0
    assert request().to_sampling_params(5, {}).prompt_logprobs is None
    assert request(logprobs=True).to_sampling_params(5, {}).prompt_logprobs == 0
    assert request(prompt_logprobs=2).to_sampling_params(5, {}).prompt_logprobs == 2


def test_request_models_are_cured_where_ours_are_served(
    served: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cured: list[str] = []
    monkeypatch.setattr(bodies, "check_bodies", lambda: cured.append("bodies"))
    monkeypatch.setattr(bodies, "echo_without_logprobs", lambda: cured.append("echo"))
    for config in (VllmConfig(), served):
        with pytest.raises(TypeError, match="executor_class"):  # vLLM's own begins
            AsyncLLM.__dict__["__init__"](object(), vllm_config=config)
        assert cured == (["bodies", "echo"] if config is served else [])
