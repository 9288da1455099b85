# SPDX-License-Identifier: Apache-2.0
"""vLLM's compiler of grammars, which the scheduler has and a worker needs too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import (
        StructuredOutputBackend,
        StructuredOutputGrammar,
    )

_managers: WeakValueDictionary[str, StructuredOutputManager] = WeakValueDictionary()


def share_compiler(manager: StructuredOutputManager) -> None:
    """Let workers in this process compile with the scheduler's `manager`."""
    _managers[manager.vllm_config.instance_id] = manager


class GrammarCompiler:
    """Compiles the grammars of requests that the scheduler has compiled before.

    Symptom: vLLM keeps what it compiles in the scheduler and sends masks to workers, one for every
    scheduled token; of a canvas only its worker knows what it holds.
    Upstream: `StructuredOutputManager.grammar_init` (vllm/v1/structured_output/__init__.py), which
    chooses the backend by the first request.
    Remove when a grammar can be compiled for a worker.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._manager: StructuredOutputManager | None = None

    def compile(self, params: SamplingParams) -> tuple[StructuredOutputGrammar, Any]:
        """A matcher for a request, and a bitmask [1, ceil(V / 32)] int32 for it to fill.

        Where scheduler and worker share a process only the matcher is new, if the backend has a
        cache; elsewhere the grammar is compiled once more, once in each worker.
        """
        from vllm.v1.structured_output.request import get_structured_output_key

        assert params.structured_outputs is not None
        backend = self._backend(params)
        kind, text = get_structured_output_key(params.structured_outputs)
        grammar = backend.compile_grammar(kind, text, stop_token_ids=params.all_stop_token_ids)
        return grammar, backend.allocate_token_bitmask(1)

    def _backend(self, params: SamplingParams) -> StructuredOutputBackend:
        from vllm.v1.structured_output import StructuredOutputManager
        from vllm.v1.structured_output.request import StructuredOutputRequest

        if self._manager is None:
            shared = _managers.get(self._vllm_config.instance_id)
            self._manager = shared or StructuredOutputManager(self._vllm_config)
        if self._manager.backend is None:
            request = SimpleNamespace(
                request_id="of a worker",
                sampling_params=params,
                structured_output_request=StructuredOutputRequest.from_sampling_params(params),
            )
            self._manager.grammar_init(cast(Any, request))
        assert self._manager.backend is not None
        return self._manager.backend
