# SPDX-License-Identifier: Apache-2.0
"""The models of HTTP requests, in the processes that serve one of our models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vllm_nbdiff.body import check_body
from vllm_nbdiff.compat.patching import patch
from vllm_nbdiff.compat.responses import return_step_maps
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.names import is_block_diffusion

_VALIDATOR = "nbdiff_check_body"


def cure_request_models() -> None:
    """Have what reads bodies changed where an engine of ours gets its client.

    Nothing else in these processes knows the model before the routes are made, which fix how a body
    is read; and other processes need not import the HTTP front end.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    def init(original: Callable[..., None]) -> Callable[..., None]:
        def initialized(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            if is_block_diffusion(vllm_config):
                check_bodies()
                echo_without_logprobs()
                config = BlockDiffusionConfig.from_vllm_config(vllm_config)
                return_step_maps(config.defaults.step_map)
            original(self, vllm_config, *args, **kwargs)

        return initialized

    patch(AsyncLLM, "__init__", init)


def check_bodies() -> None:
    """Check a body before vLLM's own validators do.

    Symptom: HTTP 500 where `structured_outputs` is no object; refusals that name no field, or one
    that vLLM derived from another.
    Upstream: validators like `CompletionRequest.check_structured_outputs_count`
    (vllm/entrypoints/openai/completion/protocol.py) and
    `ChatCompletionRequest.check_structured_outputs_count`
    (vllm/entrypoints/openai/chat_completion/protocol.py), which know no model.
    Remove when they take any JSON, and a model can refuse a field of a body.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for model in (CompletionRequest, ChatCompletionRequest):
        validators = model.__pydantic_decorators__.model_validators
        if _VALIDATOR in validators:
            continue
        # The last one that runs before the fields are read runs first.
        validators[_VALIDATOR] = dataclasses.replace(
            validators["check_structured_outputs_count"], cls_var_name=_VALIDATOR, func=check_body
        )
        model.model_rebuild(force=True)


def echo_without_logprobs() -> None:
    """Let a chat echo without asking for the prompt's logprobs.

    Symptom: `echo` alone is refused, because of `prompt_logprobs`.
    Upstream: `ChatCompletionRequest.to_sampling_params`
    (vllm/entrypoints/openai/chat_completion/protocol.py), which takes the default of
    `top_logprobs`, 0, for a number that was asked for.
    Remove when it asks for logprobs with `logprobs` only.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    def to_sampling_params(original: Callable[..., Any]) -> Callable[..., Any]:
        def made(self: Any, *args: Any, **kwargs: Any) -> Any:
            params = original(self, *args, **kwargs)
            if self.prompt_logprobs is None and not self.logprobs:
                params.prompt_logprobs = None
            return params

        return made

    patch(ChatCompletionRequest, "to_sampling_params", to_sampling_params)
