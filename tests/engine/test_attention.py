# SPDX-License-Identifier: Apache-2.0
"""The plugin's own attention backend under the engine, its kernels interpreted or in PyTorch."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.conftest import options, tokens_of
from tests.engine.conftest import plugins_attention
from tests.engine.structured import COMPACT, NANO
from tests.engine.structured import MASK as NANO_MASK
from tests.engine.test_golden import request_of
from tests.engine.test_static_shapes import every_request, generate
from tests.interpreter import interpret_kernels

interpret_kernels()

from vllm_nbdiff.kernels.segment_table import SegmentTable  # noqa: E402

from vllm_nbdiff.decoding import draws  # noqa: E402
from vllm_nbdiff.engine.attention import (  # noqa: E402
    SegmentAttentionBackend,
    SegmentAttentionImpl,
    SegmentMetadata,
)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_golden_in_pytorch(
    own_attention: None,
    static: bool,
    golden_checkpoint: Any,
    golden_cases: list[dict[str, Any]],
    make_llm: Callable[..., Any],
) -> None:
    """Chunked prefill, prefix cache, commits and denoise steps mixed in one batch."""
    nbdiff = {"static_shapes": static, "attention_kernel": "torch"}
    llm = make_llm(
        golden_checkpoint,
        block_length=8,
        block_size=16,
        max_num_batched_tokens=64,
        additional_config={"nbdiff": nbdiff},
    )
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert runner.attn_groups[0][0].backend is SegmentAttentionBackend
    cases = [case for case in golden_cases if case["block_length"] == 8]
    prompts, params = zip(*(request_of(case) for case in cases), strict=True)
    for _ in range(2):
        outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
        assert tokens_of(outputs) == [case["expected"] for case in cases]


@pytest.mark.parametrize("attends", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_option_with_interpreted_kernels(
    attends: bool,
    make_llm: Callable[..., Any],
    make_async_llm: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All in one batch, with two in flight, as on a GPU but for its speed: row statistics and
    draws, attention and KV writes too, give the text of the plain functions."""
    settings: dict[str, Any] = {
        **{"block_length": 8, "mask": NANO_MASK, "max_model_len": 128, "block_size": 32},
        **{"max_num_batched_tokens": 640, "kv_cache_memory_bytes": 1 << 26},
        **{"skip_tokenizer_init": False, "structured_outputs_config": COMPACT},
    }
    nbdiff = {"allow_mask_token_in_prompt": True}
    requests = every_request(max_tokens=9, prompts=8)
    for (prompt, _), extra in zip(requests, (options(), options(mode="verify")), strict=False):
        constraint = StructuredOutputsParams(regex="[0-9]{3} (yes|no)")
        params = SamplingParams(
            temperature=0, max_tokens=9, structured_outputs=constraint, extra_args=extra
        )
        requests.append((prompt, params))
    plain = make_llm(NANO, additional_config={"nbdiff": nbdiff}, **settings)
    expected = generate(plain, requests)
    with plugins_attention() if attends else nullcontext():
        static = {"nbdiff": nbdiff | {"static_shapes": True}}
        llm = make_async_llm(NANO, additional_config=static, **settings)
    monkeypatch.setattr(draws, "has_kernels", lambda logits: True)
    # An interpreted operation takes about as long for many rows of logits as for few.
    monkeypatch.setattr("vllm_nbdiff.kernels.row_sample.TILE", 1 << 17)
    given = generate(llm, requests)
    assert [i for i, texts in enumerate(given) if texts != expected[i]] == []


def test_keys_are_cut_once_a_forward(own_attention: None) -> None:
    """By its first layer, for all of them; for the next forward, or graph, anew."""
    given: list[Any] = []
    impl = SegmentAttentionImpl.__new__(SegmentAttentionImpl)
    impl.head_size, impl.scale, impl.runs_kernels, impl._is_fp8 = 32, 1.0, True, False
    impl._attend = lambda *inputs, launch, **options: given.append(launch.parts)
    cache, query = torch.zeros(4, 2, 16, 64), torch.zeros(8, 4, 32)
    start, length = torch.tensor([0, 8], dtype=torch.int32), torch.tensor([60], dtype=torch.int32)
    table = SegmentTable(start, length, length * 0, torch.arange(4, dtype=torch.int32)[None])
    for _ in range(2):
        metadata = SegmentMetadata(table, num_tokens=8, max_query_len=8, max_kv_len=60)
        for layer in range(2):
            impl.forward(layer, query, query, query, cache, metadata, torch.empty_like(query))
    assert given[0] is given[1] and given[2] is given[3] and given[0] is not given[2]
    assert int(given[0].starts[-1, 1]) > 1  # parts


def test_fp8_cache(
    own_attention: None, make_checkpoint: Callable[..., Any], make_llm: Callable[..., Any]
) -> None:
    """A cache of half the bytes gives much the same text, and not quite the same KV."""
    folder, _ = make_checkpoint("llama", seed=4, dtype="bfloat16")
    prompts = [{"prompt_token_ids": [5 + i, 17, 3 * i]} for i in range(24)]
    params = SamplingParams(
        temperature=0, max_tokens=8, detokenize=False, ignore_eos=True, extra_args=options()
    )
    engines = [
        make_llm(
            folder,
            block_length=8,
            mask=159,
            dtype="bfloat16",
            kv_cache_dtype=dtype,
            max_model_len=64,
            additional_config={"nbdiff": {"attention_kernel": "torch"}},
        )
        for dtype in ("fp8", "auto")
    ]
    small, whole = (tokens_of(llm.generate(prompts, params, use_tqdm=False)) for llm in engines)
    same = sum(a == b for x, y in zip(small, whole, strict=True) for a, b in zip(x, y, strict=True))
    # A random model's text drifts; without the prompt's KV it would agree by chance, once.
    assert small != whole and same > 2 * len(prompts)


def test_what_it_cannot_do_is_named() -> None:
    for name, value in {
        "sliding_window": 64,
        "logits_soft_cap": 30.0,
        "alibi_slopes": [1.0],
    }.items():
        with pytest.raises(ValueError, match=f"{name} is not supported .* TRITON_ATTN"):
            SegmentAttentionImpl(4, 32, 0.1, 2, **{name: value})
