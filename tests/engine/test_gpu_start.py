# SPDX-License-Identifier: Apache-2.0
"""What vLLM does on a GPU before it serves, done on a CPU: warm-up steps, inputs of CUDA graphs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

from tests.conftest import tokens_of
from tests.engine.conftest import plugins_attention
from tests.engine.test_golden import request_of
from vllm_nbdiff.engine.model_state import NBDiffModelState


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


def test_a_captured_graph_reads_what_a_step_writes(
    llm: Any, golden_cases: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention metadata at capture and in a step are views of the same memory."""
    runner = worker_of(llm).model_runner

    def addresses(metadata: dict[str, Any]) -> set[tuple[int, ...]]:
        return {tuple(x.data_ptr() for x in layer.segments) for layer in metadata.values()}

    seen: list[set[tuple[int, ...]]] = []
    prepare = NBDiffModelState.prepare_attn

    def noted(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = prepare(self, batch, *args, **kwargs)
        if batch.num_draft_tokens == batch.num_tokens:
            seen.append(addresses(metadata))
        return metadata

    monkeypatch.setattr(NBDiffModelState, "prepare_attn", noted)
    cases = [case for case in golden_cases if case["block_length"] == 8][:3]
    prompts, params = zip(*(request_of(case) for case in cases), strict=True)
    llm.generate(list(prompts), list(params), use_tqdm=False)
    captured, _ = prepare_inputs_to_capture(
        3,
        24,
        runner.model_state,
        runner.input_buffers,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
        full_cudagraph=True,
        max_query_len=8,
    )
    assert len(seen) > 5 and all(step == addresses(captured) for step in seen)


def test_ignoring_its_grammar_is_needed(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(llm)
    patched = StructuredOutputsWorker.apply_grammar_bitmask
    monkeypatch.setattr(StructuredOutputsWorker, "apply_grammar_bitmask", patched.__wrapped__)
    with pytest.raises(AssertionError):
        warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
