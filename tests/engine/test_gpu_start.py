# SPDX-License-Identifier: Apache-2.0
"""What vLLM does on a GPU before it serves, done on a CPU: warm-up steps."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

from tests.conftest import tokens_of
from tests.engine.conftest import plugins_attention
from tests.engine.test_golden import request_of


@pytest.fixture(scope="module")
def llm(golden_checkpoint: Any, make_llm: Callable[..., Any]) -> Iterator[Any]:
    nbdiff = {"static_shapes": True, "attention_kernel": "torch"}
    with plugins_attention():
        yield make_llm(
            golden_checkpoint, block_length=8, max_num_seqs=6, additional_config={"nbdiff": nbdiff}
        )


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_warm_up_leaves_nothing_behind(llm: Any, golden_cases: list[dict[str, Any]]) -> None:
    """Its requests use every sampling parameter, with and without drafts, and are no real ones."""
    worker = worker_of(llm)
    steps = worker.execute_model, worker.sample_tokens
    warmup_kernels(worker.model_runner, *steps)
    assert run_mixed_prefill_decode_warmup(worker.model_runner, *steps, num_tokens=64)
    cases = [case for case in golden_cases if case["block_length"] == 8][:12]
    prompts, params = zip(*(request_of(case) for case in cases), strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    assert tokens_of(outputs) == [case["expected"] for case in cases]


def test_ignoring_its_grammar_is_needed(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(llm)
    patched = StructuredOutputsWorker.apply_grammar_bitmask
    monkeypatch.setattr(StructuredOutputsWorker, "apply_grammar_bitmask", patched.__wrapped__)
    with pytest.raises(AssertionError):
        warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
