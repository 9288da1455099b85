# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a step is on the model's device, and no value of it is read or waited for.

The device is PyTorch's `meta`, whose tensors have no values and do not mix with those of a CPU.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.conftest import options
from tests.engine.no_waiting import NoSynchronisation
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.decoding.canvas import CanvasTable
from vllm_nbdiff.decoding.rows import token_rows
from vllm_nbdiff.decoding.sampling import Drawn
from vllm_nbdiff.engine import sampler
from vllm_nbdiff.engine.constraints import ConstraintTable
from vllm_nbdiff.engine.decoder import Decoder
from vllm_nbdiff.engine.grammars import GrammarTable
from vllm_nbdiff.engine.logprobs import LogprobTable
from vllm_nbdiff.engine.model_state import NBDiffModelState
from vllm_nbdiff.engine.options import OptionTable
from vllm_nbdiff.engine.sampler import RowSampler
from vllm_nbdiff.engine.schedule import ScheduleReader
from vllm_nbdiff.engine.step_map import StepTable
from vllm_nbdiff.engine_options import EngineOptions
from vllm_nbdiff.request_options import RequestOptions

VOCAB, LENGTH = 64, 8
KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (options(), {}),
    (options(mode="verify"), {"temperature": 0.7, "top_k": 5}),
    (options(mode="ar"), {"frequency_penalty": 0.5, "min_tokens": 3, "stop_token_ids": [4]}),
    (options(fused_commit=1), {}),
    (options(block_cache=1, small_blocks=2), {"allowed_token_ids": [1, 2], "logit_bias": {1: 2}}),
    (options(algorithm="freedave"), {"repetition_penalty": 1.3}),
    (options(algorithm="entropy_bound"), {"bad_words": [[3], [4, 5]]}),
]


def draw_rows(logits: torch.Tensor, *_: Any) -> Drawn:
    """What kernels give, by shape."""
    real = torch.zeros(len(logits), device=logits.device)
    return Drawn(real.long(), real, real)


def test_an_arrival_and_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "draw_rows", draw_rows)
    device = torch.device("meta")
    config = BlockDiffusionConfig(
        model_type="llama",
        block_length=LENGTH,
        mask_token_id=VOCAB - 1,
        vocab_size=VOCAB,
        tensor_parallel_size=1,
        defaults=RequestOptions(block_length=LENGTH).resolved(),
        engine=EngineOptions(static_shapes=True),
    )
    count = len(KINDS) + 1  # the last one computes a prompt
    text = torch.zeros(count, 256, dtype=torch.int32, device=device)
    no_config: Any = None  # no request has a grammar
    state: Any = object.__new__(NBDiffModelState)
    state.config, state.device, state.adapters = config, device, None
    state._slot_of, state._page_size, state._row_limit = {}, 16, 512
    state._lookahead = np.zeros(count + 1, np.int64)
    state.table = table = CanvasTable(count, LENGTH, VOCAB, device)
    state.options = OptionTable(config, count, 256, 512, 0, device)
    state.constraints = ConstraintTable(count, VOCAB, text)
    state.grammars = GrammarTable(no_config, count, text, VOCAB - 1)
    state.logprobs = logprobs = LogprobTable(count, LENGTH, VOCAB, "raw_logprobs", device)
    state.steps = steps = StepTable(count, LENGTH, device)
    state.reader = ScheduleReader(state.options, table, text, state._lookahead, True, 512, device)
    rows_of_logits = RowSampler(state.constraints, state.grammars, logprobs, VOCAB - 1)
    decoder = Decoder(table, state.options, rows_of_logits, steps)
    with NoSynchronisation():
        for slot, (extra, arguments) in enumerate([*KINDS, ({}, {})]):
            state.add_request(slot, arriving(slot, extra, dict(arguments)))
        results = step(state, decoder, count)
    tensors = (*results, table.tokens, table.fields, table.stops)
    assert all(tensor.device == device for tensor in tensors)


def arriving(slot: int, extra: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """A request as the runner hands it over."""
    words = arguments.pop("bad_words", None)
    arguments = {"temperature": 0, "max_tokens": 50, "stop_token_ids": [3, 40], **arguments}
    if slot % 2 == 0:
        arguments["logprobs"] = slot
    if slot % 3 == 0:
        extra = extra | options(step_map=1)
    params = SamplingParams(extra_args=extra, **arguments)
    params._eos_token_id, params._bad_words_token_ids = 2, words
    request = {"req_id": str(slot), "prompt_len": 20, "prompt_token_ids": [5] * 20}
    return SimpleNamespace(sampling_params=params, lora_request=None, **request)


def step(state: Any, decoder: Decoder, count: int) -> list[torch.Tensor]:
    """One step of the requests that have arrived; tensors of all kinds that it gives."""
    device = state.device
    state.options.upload()
    rows = np.full(count, 3 * LENGTH)
    runner: Any = SimpleNamespace(
        num_reqs=count,
        idx_mapping_np=np.arange(count),
        num_scheduled_tokens=rows,
        num_draft_tokens_per_req=np.where(np.arange(count) < count - 1, rows, 0),
        num_computed_prefill_tokens_np=np.zeros(count, np.int64),
        prefill_len_np=np.full(count, 20),
        num_computed_tokens_np=np.full(count, 20),
    )
    schedule = state.reader.read(runner, 16)
    decoder.begin(schedule)
    plan = decoder.plan()
    starts = torch.arange(count + 1, device=device, dtype=torch.int32) * 3 * LENGTH
    laid_out = token_rows(plan.segments, (starts, int(rows.sum())))
    prompt = torch.zeros(len(laid_out.owner), dtype=torch.int64, device=device)
    ids = laid_out.tokens(plan.segments, prompt, schedule.batch.decodes)
    needed = decoder.logits_rows(starts)
    assert len(needed) == count * schedule.facts.rows
    decoder.decide(torch.zeros(len(needed), VOCAB, dtype=torch.bfloat16, device=device))
    decoder.end()
    counts = decoder.tally.columns(schedule.batch.decodes)
    scores = state.logprobs.collect(decoder.emitted.tokens)
    assert scores is not None
    maps = state.steps.collect(decoder.emitted.tokens.shape[1])
    assert maps is not None
    emitted = decoder.emitted
    return [ids, needed, emitted.tokens, emitted.count, counts, scores.logprobs, maps.steps]
