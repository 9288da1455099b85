# SPDX-License-Identifier: Apache-2.0
"""Step maps in HTTP responses, whole and in pieces."""

from __future__ import annotations

import copy
import json
import reprlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from vllm_nbdiff.compat.patching import patch
from vllm_nbdiff.refusal import refuse

_OPTION = "nbdiff_step_map"

Asks = Callable[[Any], bool]
"""Whether the request of a body wants its step map."""


def return_step_maps(default: bool) -> None:
    """Add `step_map` to the choices of chats and completions that ask for it.

    Symptom: vLLM gives of an engine's output the fields that it knows.
    Upstream: `OpenAIServingChat.chat_completion_stream_generator`,
    `OpenAIServingChat.chat_completion_full_generator`
    (vllm/entrypoints/openai/chat_completion/serving.py),
    `OpenAIServingCompletion.completion_stream_generator`,
    `OpenAIServingCompletion.request_output_to_completion_response`
    (vllm/entrypoints/openai/completion/serving.py).
    Remove when a model may add fields to a choice.

    Args:
        default: whether a request asks that does not say.
    """

    def asks(request: Any) -> bool:
        return bool((request.vllm_xargs or {}).get(_OPTION, default))

    _of_chats(asks)
    _of_completions(asks)
    _refuse_elsewhere()


def _of_chats(asks: Asks) -> None:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    def stream(original: Callable[..., Any]) -> Callable[..., Any]:
        def streamed(
            self: Any, request: Any, result_generator: Any, *args: Any, **more: Any
        ) -> Any:
            if not asks(request):
                return original(self, request, result_generator, *args, **more)
            pieces = _Pieces()
            results = pieces.read(_after_empty_one(result_generator))
            return pieces.write(original(self, request, results, *args, **more))

        return streamed

    def whole(original: Callable[..., Any]) -> Callable[..., Any]:
        async def answered(
            self: Any, request: Any, result_generator: Any, *args: Any, **more: Any
        ) -> Any:
            if not asks(request):
                return await original(self, request, result_generator, *args, **more)
            last: Any = None

            async def results() -> AsyncGenerator[Any, None]:
                nonlocal last
                async with aclosing(result_generator):
                    async for last in result_generator:
                        yield last

            response = await original(self, request, results(), *args, **more)
            return _with_step_maps(response, [last])

        return answered

    patch(OpenAIServingChat, "chat_completion_stream_generator", stream)
    patch(OpenAIServingChat, "chat_completion_full_generator", whole)


def _of_completions(asks: Asks) -> None:
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    def stream(original: Callable[..., Any]) -> Callable[..., Any]:
        def streamed(
            self: Any, request: Any, inputs: Any, result_generator: Any, *args: Any, **more: Any
        ) -> Any:
            if not asks(request):
                return original(self, request, inputs, result_generator, *args, **more)
            pieces = _Pieces(request.n or 1)
            results = pieces.read(result_generator)
            return pieces.write(original(self, request, inputs, results, *args, **more))

        return streamed

    def whole(original: Callable[..., Any]) -> Callable[..., Any]:
        def answered(self: Any, results: Any, request: Any, *args: Any, **more: Any) -> Any:
            response = original(self, results, request, *args, **more)
            return _with_step_maps(response, results) if asks(request) else response

        return answered

    patch(OpenAIServingCompletion, "completion_stream_generator", stream)
    patch(OpenAIServingCompletion, "request_output_to_completion_response", whole)


def _refuse_elsewhere() -> None:
    """Refuse the option at endpoints whose answers have no choices of one token sequence each.

    Upstream: `OpenAIServingResponses.create_responses`
    (vllm/entrypoints/openai/responses/serving.py), `AnthropicServingMessages.create_messages`
    (vllm/entrypoints/anthropic/serving.py), `OpenAIServingChatBatch.create_batch_chat_completion`
    (vllm/entrypoints/openai/chat_completion/batch_serving.py), `ServingTokens.serve_tokens`
    (vllm/entrypoints/scale_out/token_in_token_out/serving.py).
    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    def check(original: Callable[..., Any]) -> Callable[..., Any]:
        async def checked(self: Any, request: Any, *args: Any, **more: Any) -> Any:
            # A batch of chats has the field only where a client sends it, of any type.
            given = getattr(request, "vllm_xargs", None)
            if given is not None and not isinstance(given, dict):
                refuse("vllm_xargs", f"must be an object, got {reprlib.repr(given)}")
            params = getattr(request, "sampling_params", None)
            if (given or getattr(params, "extra_args", None) or {}).get(_OPTION):
                refuse(_OPTION, "is answered by /v1/chat/completions and /v1/completions only")
            return await original(self, request, *args, **more)

        return checked

    patch(OpenAIServingResponses, "create_responses", check)
    patch(AnthropicServingMessages, "create_messages", check)
    patch(OpenAIServingChatBatch, "create_batch_chat_completion", check)
    patch(ServingTokens, "serve_tokens", check)


def _with_step_maps(response: Any, results: list[Any]) -> Any:
    """A response, or an error without choices, to the outputs of one or more prompts."""
    outputs = [output for result in results if result is not None for output in result.outputs]
    for choice, output in zip(getattr(response, "choices", ()), outputs, strict=False):
        choice.step_map = output.step_map
    return response


async def _after_empty_one(results: Any) -> AsyncGenerator[Any, None]:
    """`results` behind one without outputs: a chat begins with chunks that have no tokens."""
    begun = False
    async with aclosing(results):
        async for result in results:
            if not begun:
                begun, first = True, copy.copy(result)
                first.outputs = []
                yield first
            yield result


class _Pieces:
    """Step maps of a stream's choices, from the engine's outputs to the chunks with their text.

    What is not sent because it has no text, such as a part of a tool call, waits for the next one.
    """

    def __init__(self, num_choices: int | None = None) -> None:
        """With the number of choices of each prompt; None: outputs do not tell prompts apart."""
        self._num_choices = num_choices
        self._waiting: dict[int, list[int]] = {}

    async def read(self, results: Any) -> AsyncGenerator[Any, None]:
        """`results` with their step maps kept."""
        async with aclosing(results):
            async for result in results:
                first, output = 0, result
                if self._num_choices is not None:
                    first, output = result[0] * self._num_choices, result[1]
                for completion in output.outputs:
                    waiting = self._waiting.setdefault(first + completion.index, [])
                    waiting += completion.step_map or ()
                yield result

    async def write(self, chunks: Any) -> AsyncGenerator[str, None]:
        """Server-sent events `chunks`, with the step maps that wait for their choices."""
        async with aclosing(chunks):
            async for chunk in chunks:
                yield self._with_steps(chunk)

    def _with_steps(self, chunk: str) -> str:
        if not any(self._waiting.values()) or not chunk.startswith("data: {"):
            return chunk
        body = json.loads(chunk.removeprefix("data: "))
        for choice in body.get("choices", ()):
            if steps := self._waiting.pop(choice["index"], None):
                choice["step_map"] = steps
        return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
