# SPDX-License-Identifier: Apache-2.0
"""A worker with a process of its own compiles what the scheduler has compiled, and as it has."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xgrammar
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output import StructuredOutputManager, utils
from vllm.v1.structured_output.backend_guidance import GuidanceBackend, GuidanceGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
from vllm.v1.structured_output.request import StructuredOutputRequest

import vllm_nbdiff
from vllm_nbdiff.compat import GrammarCompiler, name_for_workers, share_compiler
from vllm_nbdiff.engine.matcher import Matcher

NANO = Path(__file__).parents[2] / "examples" / "nbdiff-nano"


@pytest.fixture(scope="module")
def with_tokenizer() -> VllmConfig:
    vllm_nbdiff.register()
    return EngineArgs(model=str(NANO), dtype="float32", max_model_len=512).create_engine_config()


def asked(backend: str, **constraint: Any) -> SamplingParams:
    """As the front end sends it on."""
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**constraint))
    assert params.structured_outputs is not None
    params.structured_outputs._backend = backend
    params.structured_outputs._backend_was_auto = True
    return params


def arrive(manager: StructuredOutputManager, params: SamplingParams) -> Any:
    """What an engine does with a request before its scheduler is given it."""
    wanted = StructuredOutputRequest.from_sampling_params(params)
    request: Any = SimpleNamespace(
        request_id="", sampling_params=params, structured_output_request=wanted
    )
    manager.grammar_init(request)
    return wanted


def test_a_worker_has_the_schedulers_backend(with_tokenizer: VllmConfig) -> None:
    """Also where the first request that it is given is not the first one that arrived."""
    manager = StructuredOutputManager(with_tokenizer)
    name_for_workers(manager)
    first, second = asked("guidance", regex="a"), asked("xgrammar", regex="b")
    for params in (first, second):
        arrive(manager, params)
    assert isinstance(manager.backend, GuidanceBackend)
    grammar, _ = GrammarCompiler(with_tokenizer).compile(second).result()
    assert isinstance(grammar, GuidanceGrammar)


def test_a_worker_goes_on_while_it_compiles(
    with_tokenizer: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits where the grammar is needed."""
    compiler = GrammarCompiler(with_tokenizer)
    compiler.compile(asked("xgrammar", regex="a")).result()
    may_end = threading.Event()
    compile_grammar = XgrammarBackend.compile_grammar

    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert may_end.wait(60)
        return compile_grammar(self, *args, **kwargs)

    monkeypatch.setattr(XgrammarBackend, "compile_grammar", wait)
    matcher = Matcher(compiler.compile(asked("xgrammar", regex="b")), 4, set())
    may_end.set()
    assert not matcher.has_ended and matcher.allowed().any()


def test_no_worker_runs_out_of_time(
    with_tokenizer: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the scheduler has not; a worker without the grammar would decode what others do not."""
    compile_regex = xgrammar.GrammarCompiler.compile_regex
    compiled = set()

    def slow_at_first(self: Any, regex: str) -> Any:
        time.sleep(0 if id(self) in compiled else 1)
        compiled.add(id(self))
        return compile_regex(self, regex)

    monkeypatch.setattr(utils, "envs", SimpleNamespace(VLLM_REGEX_COMPILATION_TIMEOUT_S=0.3))
    monkeypatch.setattr(xgrammar.GrammarCompiler, "compile_regex", slow_at_first)
    params = asked("xgrammar", regex="[0-9]+")
    request = arrive(StructuredOutputManager(with_tokenizer), params)
    with pytest.raises(ValueError, match="timed out"):
        request._grammar.result()
    GrammarCompiler(with_tokenizer).compile(params).result()


def test_what_the_scheduler_has_compiled_is_not_compiled_again(
    with_tokenizer: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they share a process, though the compiler's cache has lost it: the engine would wait. A
    request that begins again has a matcher at its beginning, whatever the scheduler's has seen."""
    manager = StructuredOutputManager(with_tokenizer)
    name_for_workers(manager)
    share_compiler(manager)
    params = asked("xgrammar", regex="[0-9]{3}[a-z]+")
    wanted = arrive(manager, params)
    while not wanted.is_grammar_ready:
        time.sleep(0.01)
    compiler = GrammarCompiler(with_tokenizer)
    first = Matcher(compiler.compile(params), 4, set()).allowed().copy()
    (digit,) = manager.tokenizer.encode("7", add_special_tokens=False)
    assert wanted.grammar.accept_tokens("", [digit])
    manager.backend.compiler.clear_cache()

    def compile_grammar(*_: Any, **__: Any) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(XgrammarBackend, "compile_grammar", compile_grammar)
    again = Matcher(compiler.compile(params), 4, set())
    assert (again.allowed() == first).all()
    assert again.accepts(digit)
