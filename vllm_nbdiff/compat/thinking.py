# SPDX-License-Identifier: Apache-2.0
"""Where thinking ends: for a model served without a tokenizer, and for a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.reasoning import ReasoningParser
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

_ASKED = "_nbdiff_thinking"


def reasoning_config(end_token_id: int) -> Any:
    """A `ReasoningConfig` of one token that ends thinking.

    Symptom: vLLM refuses `thinking_token_budget` without a reasoning config, and makes one from
    strings only, by a tokenizer. Upstream: `ReasoningConfig.initialize_token_ids`
    (vllm/config/reasoning.py). Remove when a reasoning config can be given token ids.
    """
    from vllm.config import ReasoningConfig

    config = ReasoningConfig()
    # What begins thinking is asked for by vLLM alone: a budget here counts every token.
    config._reasoning_start_token_ids = [end_token_id]
    config._reasoning_end_token_ids = [end_token_id]
    config._natural_reasoning_end_token_ids = [end_token_id]
    return config


def begins_by_thinking(params: SamplingParams) -> bool:
    """Whether `name_thinking` has said so of a request with a grammar."""
    return getattr(params.structured_outputs, _ASKED, None) is not None


def name_thinking(manager: StructuredOutputManager, request: Request) -> None:
    """Say in a request with a grammar whether it begins by thinking, and how that is parsed: the
    template's arguments. Part of `grammars.name_for_workers`."""
    wanted, params = request.structured_output_request, request.sampling_params
    if wanted is not None and params is not None:
        thinks = manager._get_constraint_bounds(request, ()).constraint_start > 0
        arguments = wanted.reasoning_parser_kwargs or {}
        setattr(params.structured_outputs, _ASKED, arguments if thinks else None)


class Thoughts:
    """The text of a request until it has thought, as vLLM's parser sees it, token by token.

    Symptom: vLLM tells where grammars begin in the scheduler alone.
    Upstream: `StructuredOutputManager._get_constraint_bounds`
    (vllm/v1/structured_output/__init__.py). Remove when a grammar can be compiled for a worker.
    """

    def __init__(self, parser: ReasoningParser, prompt: list[int]) -> None:
        from vllm.parser.engine.adapters import ParserEngineReasoningAdapter

        self._parser = parser
        # It tells which ends of thinking are of the answer.
        self._engine = parser if isinstance(parser, ParserEngineReasoningAdapter) else None
        self._tokens = list(prompt)
        self._thought: int | None = None  # tokens, once thinking has ended

    @property
    def go_on(self) -> bool:
        """Whether thinking has not ended."""
        return self._thought is None

    def take(self, token: int) -> bool:
        """Move past `token`; whether it is of the answer already, which it began."""
        self._tokens.append(token)
        ends, is_answer = self._ends(token)
        if ends:
            self._thought = len(self._tokens)
        return is_answer

    def back(self, count: int) -> None:
        """Go back by so many tokens that were taken."""
        del self._tokens[len(self._tokens) - count :]
        if self._thought is not None and len(self._tokens) < self._thought:
            self._thought = None

    def _ends(self, token: int) -> tuple[bool, bool]:
        found = None if self._engine is None else self._engine.find_reasoning_end([token])
        if found is not None:
            ends = found.offset == 0  # else it lies behind what was asked about
            return ends, ends and found.implicit
        return self._parser.is_reasoning_end_streaming(self._tokens, [token]), False


def thoughts_of(
    vllm_config: VllmConfig, params: SamplingParams, prompt: list[int]
) -> Thoughts | None:
    """Of a request in which they were named; None: its grammar holds from the start."""
    arguments = getattr(params.structured_outputs, _ASKED, None)
    if arguments is None:
        return None
    from vllm.reasoning import ReasoningParserManager
    from vllm.tokenizers import cached_tokenizer_from_config

    settings = vllm_config.structured_outputs_config
    if settings.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(settings.reasoning_parser_plugin)
    make = ReasoningParserManager.get_reasoning_parser(settings.reasoning_parser)
    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    return Thoughts(make(tokenizer=tokenizer, **arguments), prompt)
