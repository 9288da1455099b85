# SPDX-License-Identifier: Apache-2.0
"""Families as a GPU decodes them: asynchronously, on the plugin's own attention, and at the edges
of a request: its end, and the prompt that it shares with others."""

from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams, envs
from vllm.exceptions import VLLMValidationError

from tests.conftest import GOLDEN, counter, tokens_of
from tests.families.engines import serve
from tests.families.test_golden import cases_of, request_of
from tests.interpreter import interpret_kernels

interpret_kernels()

from vllm_nbdiff.decoding import draws  # noqa: E402

ARCHITECTURES = {
    "nemotron_labs_diffusion": ("NemotronLabsDiffusionModel", 100),
    "sdar": ("SDARForCausalLM", 255),
    "fast_dllm_v2": ("Fast_dLLM_QwenForCausalLM", 254),
    "llada2": ("LLaDA2MoeModelLM", 253),
}
"""By the name of its golden cases: what a config.json names, and the mask."""
STATIC: dict[str, Any] = {"static_shapes": True}


def make(factory: Callable[..., Any], family: str, length: int = 8, **settings: Any) -> Any:
    """An engine of `make_llm` or `make_async_llm`."""
    architecture, mask = ARCHITECTURES[family]
    overrides = {"architectures": [architecture], "end_think_token_id": 77}
    return factory(
        GOLDEN / family / "tiny_a", block_length=length, mask=mask, hf_overrides=overrides,
        kv_cache_memory_bytes=1 << 26, **settings,
    )  # fmt: skip


def assert_golden(llm: Any, family: str) -> None:
    """Two of each of the cases of blocks of 8, then once more."""
    cases = 2 * cases_of(family, 8)
    prompts, params = zip(*map(request_of, cases), strict=True)
    for _ in range(2):
        outputs = tokens_of(llm.generate(list(prompts), list(params), use_tqdm=False))
        assert outputs == [case["expected"] for case in cases]


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("preempts", [False, True])
def test_asynchronous(make_async_llm: Callable[..., Any], family: str, preempts: bool) -> None:
    """A step is scheduled while one is in flight."""
    few = {"max_model_len": 320, "num_gpu_blocks_override": 14, "block_size": 32}
    settings = few if preempts else {"max_num_batched_tokens": 64}
    llm = make(make_async_llm, family, additional_config={"nbdiff": STATIC}, **settings)
    assert_golden(llm, family)
    assert (counter(llm, "vllm:num_preemptions") > 0) == preempts


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_own_attention(own_attention: None, make_llm: Callable[..., Any], family: str) -> None:
    nbdiff = {**STATIC, "attention_kernel": "torch"}
    llm = make(
        make_llm, family, block_size=16, max_num_batched_tokens=64,
        additional_config={"nbdiff": nbdiff},
    )  # fmt: skip
    assert_golden(llm, family)


@pytest.mark.parametrize("count", [2, pytest.param(None, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_kernel_interpreted(
    own_attention: None,
    make_llm: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    count: int | None,
) -> None:
    """Cases of few forwards: an interpreted kernel is slow."""
    cases = sorted(cases_of(family, 8), key=lambda case: case["forwards"])[:count]
    assert family != "llada2" or any(case.get("edited_tokens") for case in cases)
    prompts, params = zip(*map(request_of, cases), strict=True)
    llm = make(make_llm, family, block_size=16, additional_config={"nbdiff": STATIC})
    monkeypatch.setattr(draws, "has_kernels", lambda logits: True)
    outputs = tokens_of(llm.generate(list(prompts), list(params), use_tqdm=False))
    assert outputs == [case["expected"] for case in cases]


def generate(llm: Any, prompt: list[int], max_tokens: int) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    (tokens,) = tokens_of(llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False))
    return tokens


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_the_end_of_the_models_length(static: bool) -> None:
    """The text is the beginning of what more room would give."""
    settings = {
        "hf_overrides": {"block_length": 16},
        "additional_config": {"nbdiff": {"static_shapes": static}},
    }
    short = serve(GOLDEN / "sdar" / "tiny_a", **settings | {"max_model_len": 96})
    long = serve(GOLDEN / "sdar" / "tiny_a", **settings)
    for length in (61, 64, 75, 80):
        prompt = [(7 * i) % 250 for i in range(length)]
        given = generate(short, prompt, 96)
        assert given == generate(long, prompt, 96)[: 96 - length] and len(given) == 96 - length
    prompt = [(7 * i) % 250 for i in range(93)]
    if static:
        with pytest.raises(VLLMValidationError, match="ends inside a block"):
            generate(short, prompt, 96)
    else:
        assert generate(short, prompt, 96) == generate(long, prompt, 3)


@pytest.mark.parametrize("family", ["sdar", "fast_dllm_v2"])
def test_a_shared_prefix_is_computed_once(family: str) -> None:
    """In whole pages, and neither a half-filled block nor what ends a request is shared."""
    settings: dict[str, Any] = {"hf_overrides": {"block_length": 16}, "max_model_len": 256}
    checkpoint = GOLDEN / family / "tiny_a"
    fresh = serve(checkpoint, enable_prefix_caching=False, **settings)
    # The last engine has the metrics.
    llm = serve(checkpoint, block_size=32, **settings)
    prompt = [(5 * i) % 250 for i in range(105)]
    first = generate(llm, prompt, 40)
    assert first == generate(fresh, prompt, 40)
    # The last one takes up the text of the first, which ended inside a block.
    for following, cached in (
        (prompt, 96), ([*prompt[:98], 3, 4], 96), (prompt[:95], 64), ([*prompt, *first, 9], 128),
    ):  # fmt: skip
        before = counter(llm, "vllm:prefix_cache_hits")
        assert generate(llm, following, 40) == generate(fresh, following, 40)
        assert counter(llm, "vllm:prefix_cache_hits") - before == cached


def model_state(llm: Any) -> Any:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.model_state


def test_a_canvas_cut_by_the_models_length_waits(
    make_llm: Callable[..., Any], make_async_llm: Callable[..., Any]
) -> None:
    """With a step in flight less is scheduled than the rows of a canvas that ends near there."""
    prompts = [[(3 * i + n) % 250 for i in range(n)] for n in range(105, 121)]
    found = []
    for factory, nbdiff in ((make_llm, {}), (make_async_llm, STATIC)):
        llm = make(factory, "sdar", max_model_len=128, additional_config={"nbdiff": nbdiff})
        params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        found.append(tokens_of(llm.generate(given, params, use_tqdm=False)))
        del llm  # one engine at a time
    assert found[0] == found[1]
    assert [len(text) for text in found[0]] == [128 - len(prompt) for prompt in prompts]


def test_a_slot_keeps_nothing_of_an_edited_canvas(make_llm: Callable[..., Any]) -> None:
    """Requests that do not edit commit beside those that do, whoever had their slots before."""
    llm = make(make_llm, "llada2")
    model_state(llm).table.fields[:] = 16
    assert_golden(llm, "llada2")


def test_a_schedule_without_any_row_has_no_nans(
    make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a prompt shorter than a block is computed with it."""
    monkeypatch.setattr(envs, "VLLM_COMPUTE_NANS_IN_LOGITS", True, raising=False)
    llm = make(make_llm, "sdar")
    assert len(generate(llm, [1, 2, 3], 9)) == 9
