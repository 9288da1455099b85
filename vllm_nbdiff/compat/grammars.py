# SPDX-License-Identifier: Apache-2.0
"""vLLM's compiler of grammars, which the scheduler has and a worker needs too."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from vllm_nbdiff.compat.thinking import name_thinking

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import (
        StructuredOutputBackend,
        StructuredOutputGrammar,
    )
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
    from vllm.v1.structured_output.request import StructuredOutputRequest

_managers: WeakValueDictionary[str, StructuredOutputManager] = WeakValueDictionary()
_wanted: WeakValueDictionary[int, StructuredOutputRequest] = WeakValueDictionary()
"""What the scheduler of this process compiles, by the identity of what a request asks for."""


def share_compiler(manager: StructuredOutputManager) -> None:
    """Let workers in this process compile with the scheduler's `manager`."""
    _managers[manager.vllm_config.instance_id] = manager


def name_for_workers(manager: StructuredOutputManager) -> None:
    """Say in every request with a grammar what its workers are to know, as soon as it arrives.

    What a reasoning parser raises there ends the request, in the scheduler it would end the engine.
    In an engine without a process of its own it reaches the caller of `generate`.

    Symptom: workers compile too, and are told neither with which backend (a request brings the one
    that the front end found for it, the scheduler has that of the first request that arrived) nor
    where the grammar begins.
    Upstream: `StructuredOutputManager.grammar_init` (vllm/v1/structured_output/__init__.py).
    Remove when a grammar can be compiled for a worker.
    """
    grammar_init = manager.grammar_init

    def init(request: Request) -> None:
        grammar_init(request)
        if request.sampling_params is not None:
            _name_backend(manager, request.sampling_params)
            name_thinking(manager, request)
            if request.structured_output_request is not None:
                asked = id(request.sampling_params.structured_outputs)
                _wanted[asked] = request.structured_output_request

    manager.grammar_init = init


def _name_backend(manager: StructuredOutputManager, params: SamplingParams) -> None:
    """Name the backend that the scheduler has compiled with."""
    from vllm.v1.structured_output.backend_guidance import GuidanceBackend

    if params.structured_outputs is not None:
        # Parameters that are not cloned as deeply share it with other requests.
        params.structured_outputs = copy.copy(params.structured_outputs)
        is_guidance = isinstance(manager.backend, GuidanceBackend)
        params.structured_outputs._backend = "guidance" if is_guidance else "xgrammar"


class GrammarCompiler:
    """Compiles the grammars of requests that the scheduler has compiled before.

    Symptom: vLLM keeps what it compiles in the scheduler and sends masks to workers, one for every
    scheduled token; of a canvas only its worker knows what it holds.
    Upstream: `StructuredOutputManager.grammar_init` (vllm/v1/structured_output/__init__.py).
    Remove when a grammar can be compiled for a worker.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._own: StructuredOutputBackend | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")

    def compile(self, params: SamplingParams) -> Future[tuple[StructuredOutputGrammar, Any]]:
        """A matcher for a request, and a bitmask [1, ceil(V / 32)] int32 for it to fill.

        Where scheduler and worker share a process only the matcher is new; a grammar of guidance
        is compiled again. Elsewhere it is compiled once more in each worker, beside its forwards.
        """
        manager = _managers.get(self._vllm_config.instance_id)
        if manager is None:
            self._own = self._own or self._make_backend(params)
            return self._thread.submit(_compile, self._own, params)
        assert manager.backend is not None
        ready: Future[tuple[StructuredOutputGrammar, Any]] = Future()
        ready.set_result(_begin_again(manager.backend, params) or _compile(manager.backend, params))
        return ready

    def _make_backend(self, params: SamplingParams) -> StructuredOutputBackend:
        from vllm.tokenizers import cached_tokenizer_from_config
        from vllm.v1.structured_output.backend_guidance import GuidanceBackend
        from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

        assert params.structured_outputs is not None
        is_guidance = params.structured_outputs._backend == "guidance"
        model = self._vllm_config.model_config
        return (GuidanceBackend if is_guidance else XgrammarBackend)(
            self._vllm_config,
            tokenizer=cached_tokenizer_from_config(model),
            vocab_size=model.get_vocab_size(),
        )


def _begin_again(
    backend: StructuredOutputBackend, params: SamplingParams
) -> tuple[StructuredOutputGrammar, Any] | None:
    """The same from what the scheduler has compiled for a request; None: nothing by xgrammar.

    Its cache may have lost that by now, and the engine waits while it is compiled.
    """
    import xgrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

    wanted = _wanted.get(id(params.structured_outputs))
    compiled = None if wanted is None else wanted.grammar
    if not (isinstance(backend, XgrammarBackend) and isinstance(compiled, XgrammarGrammar)):
        return None
    own: XgrammarBackend = backend
    matcher = xgrammar.GrammarMatcher(
        compiled.ctx,
        override_stop_tokens=list(params.all_stop_token_ids) or None,
        max_rollback_tokens=own.num_speculative_tokens,
    )
    grammar = XgrammarGrammar(matcher=matcher, vocab_size=compiled.vocab_size, ctx=compiled.ctx)
    return grammar, backend.allocate_token_bitmask(1)


def _compile(
    backend: StructuredOutputBackend, params: SamplingParams
) -> tuple[StructuredOutputGrammar, Any]:
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
    from vllm.v1.structured_output.request import get_structured_output_key

    assert params.structured_outputs is not None
    kind, text = get_structured_output_key(params.structured_outputs)
    if kind is StructuredOutputOptions.REGEX and isinstance(backend, XgrammarBackend):
        _fill_cache(backend, text)
    grammar = backend.compile_grammar(kind, text, stop_token_ids=params.all_stop_token_ids)
    return grammar, backend.allocate_token_bitmask(1)


def _fill_cache(backend: XgrammarBackend, regex: str) -> None:
    """Compile with no limit of time, so that no worker is without what others and the scheduler,
    which has such a limit, have compiled."""
    backend.compiler.compile_regex(regex)
