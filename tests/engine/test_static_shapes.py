# SPDX-License-Identifier: Apache-2.0
"""Forwards of static shapes, as on a GPU: the same text, on the runner's rows, and no waiting."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d

from tests.conftest import counter, options, tokens_of
from tests.engine.no_waiting import NoSynchronisation
from tests.engine.test_golden import request_of
from vllm_nbdiff.decoding.indices import indices
from vllm_nbdiff.engine import sampler
from vllm_nbdiff.engine.loop import ForwardLoop
from vllm_nbdiff.engine.model_state import NBDiffModelState

ENGINES: dict[str, dict[str, Any]] = {
    "8-chunked-cached": {"block_length": 8, "max_num_batched_tokens": 64},
    "8-preempted": {
        "block_length": 8,
        "max_model_len": 320,
        "num_gpu_blocks_override": 14,
        "block_size": 32,
    },
    "32-cached": {"block_length": 32, "max_num_batched_tokens": 8192},
}
STATIC = {"nbdiff": {"static_shapes": True}}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: Any, golden_checkpoint: Any, make_llm: Callable[..., Any]) -> Iterator[Any]:
    llm = make_llm(golden_checkpoint, additional_config=STATIC, **ENGINES[request.param])
    yield request.param, llm


def test_golden(engine: Any, golden_cases: list[dict[str, Any]]) -> None:
    """All cases of one block length in one batch, then once more."""
    name, llm = engine
    cases = [case for case in golden_cases if name.startswith(f"{case['block_length']}-")]
    prompts, params = zip(*(request_of(case) for case in cases), strict=True)
    expected = [case["expected"] for case in cases]
    for _ in range(2):
        outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
        assert tokens_of(outputs) == expected
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert (preemptions > 0) == name.endswith("preempted")


@pytest.fixture(scope="module")
def pair(golden_checkpoint: Any, make_llm: Callable[..., Any]) -> Iterator[Any]:
    """Engines whose shapes are static, and depend on values."""
    sizes: dict[str, Any] = {"block_length": 8, "max_num_batched_tokens": 160, "block_size": 32}
    sizes |= {"max_model_len": 256}
    dynamic = make_llm(golden_checkpoint, **sizes)
    # The last engine has the metrics.
    yield make_llm(golden_checkpoint, additional_config=STATIC, **sizes), dynamic


def every_request(
    max_tokens: int = 21, prompts: int = 250
) -> list[tuple[dict[str, Any], SamplingParams]]:
    """Prompts and parameters of every kind; `prompts` different lengths from 3 on, at most."""
    sampled = {"temperature": 0.8, "seed": 5}
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (options(), {}),
        (options(threshold=0.02, small_blocks=2), {}),
        (options(algorithm="entropy"), {}),
        (options(algorithm="margin"), {}),
        (options(algorithm="factor", threshold=3.0), {}),
        (options(algorithm="entropy_bound", threshold=6.0), {}),
        (options(algorithm="entropy_threshold", threshold=5.0), {}),
        (options(block_length=4, small_blocks=2), {}),
        ({"diffusion_max_steps": 3}, {}),
        (options(mode="ar"), {}),
        (options(mode="auto"), {}),
        (options(mode="verify", draft_length=5), {}),
        (options(mode="verify", draft_length=8, draft_steps=2), {}),
        (options(mode="verify", draft_length=4, fused_commit=1), {}),
        (options(mode="verify", fan_out=0), {}),
        (options(mode="verify", fan_out=8), {}),
        (options(mode="verify", draft_length=6, fan_out=2), sampled),
        (options(), sampled),
        (options(), sampled | {"top_k": 20}),
        (options(), sampled | {"top_p": 0.7, "top_k": 50}),
        (options(), sampled | {"min_p": 0.02}),
        (options(mode="ar"), sampled),
        (options(mode="verify"), sampled | {"top_p": 0.9}),
        (options(algorithm="entropy"), sampled),
        (options(algorithm="margin"), sampled | {"min_p": 0.02, "top_p": 0.7}),
        (options(), {"repetition_penalty": 1.3}),
        (options(mode="verify"), {"frequency_penalty": 0.7, "presence_penalty": 0.4}),
        (options(), {"logit_bias": {7: 5.0}}),
        (options(), {"allowed_token_ids": list(range(40, 90))}),
        (options(), sampled | {"min_tokens": max_tokens // 2, "stop_token_ids": list(range(200))}),
        (options(mode="ar"), {"stop_token_ids": list(range(100))}),
        (options(), {"ignore_eos": False, "min_tokens": 3}),
        (options(fused_commit=1), {}),
        (options(fused_commit=1, threshold=0.02), {"temperature": 0.4, "seed": 9}),
        (options(block_cache=1, small_blocks=2), {}),
        (options(algorithm="freedave"), {}),
        (options(algorithm="freedave", small_blocks=2), {"repetition_penalty": 1.2}),
        (options(step_map=1), {"logprobs": 2}),
        (options(mode="verify", step_map=1), sampled | {"logprob_token_ids": [7, 300]}),
        (options(mode="ar"), {"logprobs": 0, "prompt_logprobs": 1}),
        (options(), sampled | {"n": 2}),
    ]
    requests = []
    for i, (extra, params) in enumerate(kinds):
        prompt = {"prompt_token_ids": [(7 * i + 3 * j) % 500 for j in range(3 + 7 * i % prompts)]}
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
        settings |= {"detokenize": False, "extra_args": extra} | params
        requests.append((prompt, SamplingParams(**settings)))
    for words in ([[3, 4], [11]], [[5], [7, 8, 9]]):
        prompt, params = requests[len(requests) % 3]
        params = params.clone()
        # With a tokenizer vLLM derives these from `bad_words`.
        params._bad_words_token_ids = words
        requests.append((prompt, params))
    return requests


def generate(llm: Any, requests: list[Any]) -> list[list[list[int]]]:
    """Token ids of every completion of each request."""
    prompts, params = zip(*requests, strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    return [[list(text.token_ids) for text in output.outputs] for output in outputs]


def test_every_option_gives_the_same_text(pair: Any) -> None:
    """All in one batch, twice, and alone."""
    static, dynamic = pair
    requests = every_request()
    expected = generate(dynamic, requests)
    assert generate(dynamic, requests) == expected
    for _ in range(2):
        given = generate(static, requests)
        assert [i for i, text in enumerate(given) if text != expected[i]] == []
    alone = [generate(static, [request])[0] for request in requests]
    assert [i for i, text in enumerate(alone) if text != expected[i]] == []
    # Tensors that all share were never written.
    assert all(indices(n, torch.device("cpu")).tolist() == list(range(n)) for n in range(128))


def device_steps(llm: Any) -> dict[str, float]:
    """Steps by the CUDA graph that they ran in."""
    name = "vllm:diffusion_num_device_steps"
    return {m.labels["graph"]: m.value for m in llm.get_metrics() if m.name == name}


def test_counts(pair: Any) -> None:
    static, _ = pair
    steps = device_steps(static).get("none", 0)
    names = ("denoising_steps", "canvas_positions", "committed_tokens")
    before = [counter(static, f"vllm:diffusion_num_{name}") for name in names]
    params = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, detokenize=False,
        extra_args=options(threshold=1.0),
    )  # fmt: skip
    static.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    after = [counter(static, f"vllm:diffusion_num_{name}") for name in names]
    # Two blocks of a seed and 7 denoise steps of one position; the first one is committed.
    assert [b - a for a, b in zip(before, after, strict=True)] == [15, 120, 16]
    assert device_steps(static) == {"none": steps + 15}


def test_text_ends_at_the_models_length(pair: Any) -> None:
    for room in (1, 5, 8, 13):
        prompt = [(3 * j) % 500 for j in range(256 - room)]
        for extra in (options(), options(algorithm="freedave"), options(fused_commit=1)):
            params = SamplingParams(
                temperature=0, max_tokens=64, ignore_eos=True, detokenize=False, extra_args=extra
            )
            here, there = (
                tokens_of(llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False))
                for llm in pair
            )
            assert here == there and len(here[0]) == room


@pytest.mark.parametrize(
    ("waits", "why"),
    [
        (lambda ones, _: ones.sum().item(), "item waits"),
        (lambda ones, _: ones[ones > 0], "flags"),
        (lambda ones, _: torch.tensor([0], device=ones.device), "tensor copies"),
        (lambda ones, _: torch.ones(1).to(ones.device), "to copies"),
        (lambda ones, _: ones[[0, 1]], "index of the host"),
        (lambda ones, places: ones.__setitem__(places, 0), "number"),
    ],
)
def test_what_waits_for_the_device(waits: Callable[..., Any], why: str) -> None:
    ones, places = torch.ones(3), torch.arange(2)
    with pytest.raises(AssertionError, match=why), NoSynchronisation():
        waits(ones, places)
    with NoSynchronisation():
        ones[places] = ones[async_tensor_h2d([1, 2], device=ones.device)].float()


def test_no_step_waits_for_the_device(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any request: its arrival, prompts, denoise steps, commits and verification."""
    static, _ = pair
    calls = {"add_request": 0, "prepare_attn": 0, "run": 0}

    def guarded(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            with NoSynchronisation():
                return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    guarded(NBDiffModelState, "add_request")
    guarded(NBDiffModelState, "prepare_attn")
    guarded(ForwardLoop, "run")
    draw_rows = sampler.draw_rows

    def unguarded(*args: Any, **kwargs: Any) -> Any:
        """On a CPU draws read values, which kernels do on the device."""
        with torch._C.DisableTorchFunction():
            return draw_rows(*args, **kwargs)

    monkeypatch.setattr(sampler, "draw_rows", unguarded)
    # What `auto` learns is read as it arrives, which on a CPU is at once.
    requests = [r for r in every_request() if r[1].extra_args.get("nbdiff_mode") != "auto"]
    generate(static, requests)
    assert calls["prepare_attn"] == calls["run"] > 3
    assert calls["add_request"] >= len(requests)
