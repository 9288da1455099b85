# SPDX-License-Identifier: Apache-2.0
"""The front end: what it admits, and how it ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vllm_nbdiff.admission import (
    clamp,
    validate_envelope,
    validate_params,
    validate_prompt,
    validate_request,
    validate_room,
)
from vllm_nbdiff.compat.patching import patch
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.names import is_block_diffusion

# As long as vLLM gives the engine on ROCm.
_ABORT_SECONDS = 15.0
_ABORT_VARIABLE = "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"
# What `generate` hands on and `process_inputs` may refuse.
_OF_INPUTS = {"lora_request", "priority", "data_parallel_rank", "session_id"}


def validate_at_admission() -> None:
    """Check parameters and prompt when a request is admitted, and clamp the engine's copy.

    Symptom: no public hook sees a request's prompt together with the engine's configuration.
    Upstream: `InputProcessor.process_inputs` (vllm/v1/engine/input_processor.py).
    Remove when a validation hook receives prompt and configuration.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    def process(original: Callable[..., Any]) -> Callable[..., Any]:
        def processed(
            self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if not is_block_diffusion(self.vllm_config) or not isinstance(params, SamplingParams):
                return original(self, request_id, prompt, params, *args, **kwargs)
            config = _config_of(self)
            # vLLM tokenizes `bad_words`, resolves `watermarking`, and refuses ids without a name.
            validate_params(params, config)
            rendered = _is_rendered(prompt)
            if rendered:
                validate_prompt(prompt.get("prompt_token_ids") or (), config)
            request = original(self, request_id, prompt, params, *args, **kwargs)
            if request.resumable:
                raise VLLMValidationError("streaming input is not supported with block diffusion")
            validate_envelope(
                request.priority,
                request_id=request.request_id,
                session_id=request.session_id,
                cache_salt=request.cache_salt,
            )
            tokens = None if rendered else request.prompt_token_ids
            validate_request(request.sampling_params, tokens, config)
            longest = self.model_config.max_model_len
            validate_room(len(request.prompt_token_ids), config, longest)
            clamp(request.sampling_params, config, longest)
            return request

        return processed

    patch(InputProcessor, "process_inputs", process)


def _is_rendered(prompt: Any) -> bool:
    """Whether a prompt is tokenized already, as that of every HTTP request is."""
    return isinstance(prompt, dict) and "type" in prompt


def _config_of(input_processor: Any) -> BlockDiffusionConfig:
    """The settings of a processor's model, read once."""
    config = getattr(input_processor, "_nbdiff_config", None)
    if config is None:
        config = BlockDiffusionConfig.from_vllm_config(input_processor.vllm_config)
        input_processor._nbdiff_config = config
    return config


def validate_before_streaming() -> None:
    """Process a request's inputs when `generate` is called, not when its first output is awaited.

    Once more than vLLM does: `generate` would take what comes out of it, but deprecates that.

    Symptom: a refused streaming request is answered HTTP 200, with the error as an event in it, or
    by a stream that breaks off.
    Upstream: `AsyncLLM.generate` (vllm/v1/engine/async_llm.py) and
    `OpenAIServingResponses._generate_with_builtin_tools`
    (vllm/entrypoints/openai/responses/serving.py), which calls it; both are async generators.
    Remove when vLLM validates a request before it starts to stream.
    """
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    def check(processor: Any, prompt: Any, params: Any, request_id: str, given: Any) -> None:
        if _is_rendered(prompt) and is_block_diffusion(processor.vllm_config):
            known = {name: given[name] for name in _OF_INPUTS & given.keys()}
            processor.process_inputs(request_id, prompt, params, ("generate",), **known)

    def generate(original: Callable[..., Any]) -> Callable[..., Any]:
        def checked(
            self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
        ) -> Any:
            check(self.input_processor, prompt, sampling_params, request_id, kwargs)
            return original(self, prompt, sampling_params, request_id, **kwargs)

        return checked

    def respond(original: Callable[..., Any]) -> Callable[..., Any]:
        def checked(
            self: Any, request_id: str, engine_input: Any, sampling_params: Any, **kwargs: Any
        ) -> Any:
            processor = self.engine_client.input_processor
            check(processor, engine_input, sampling_params, request_id, kwargs)
            return original(self, request_id, engine_input, sampling_params, **kwargs)

        return checked

    patch(AsyncLLM, "generate", generate)
    patch(OpenAIServingResponses, "_generate_with_builtin_tools", respond)


def name_grammars() -> None:
    """Have refusals of a grammar name `structured_outputs`.

    Symptom: HTTP 400 that says "Invalid grammar specification." and names no field.
    Upstream: `SamplingParams._validate_structured_outputs` (vllm/sampling_params.py).
    Remove when it raises with the parameter.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    def validate(original: Callable[..., None]) -> Callable[..., None]:
        def validated(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                original(self, *args, **kwargs)
            except (ValueError, VLLMValidationError) as error:
                message = f"structured_outputs: {error}"
                raise VLLMValidationError(message, parameter="structured_outputs") from error

        return validated

    patch(SamplingParams, "_validate_structured_outputs", validate)


def abort_requests_at_shutdown() -> None:
    """Give the engine time to abort its requests when the server is told to end.

    Symptom: with the default `--shutdown-timeout 0` the front end kills the engine at once, nobody
    ends the running requests, and the server waits until their clients hang up.
    Upstream: `AsyncLLM.shutdown` (vllm/v1/engine/async_llm.py), `CoreEngineProcManager.shutdown`,
    `get_engine_process_shutdown_timeout` (vllm/v1/engine/utils.py), where only ROCm is given such
    time, and from vLLM 0.33 on whoever sets `VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS`.
    Remove when every platform is.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    def shutdown(original: Callable[..., None]) -> Callable[..., None]:
        def shut(self: Any, timeout: float | None = None) -> None:
            if timeout == 0 and is_block_diffusion(self.vllm_config):
                timeout = float(os.environ.get(_ABORT_VARIABLE, _ABORT_SECONDS))
            original(self, timeout)

        return shut

    patch(AsyncLLM, "shutdown", shutdown)
