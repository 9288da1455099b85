# SPDX-License-Identifier: Apache-2.0
"""Decoding decided on the device gives the same text, on the runner's rows, and never waits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode

from tests.conftest import counter, options, tokens_of
from tests.engine.test_golden import request_of
from tests.interpreter import CANVAS_KERNELS, ROW_KERNELS, interpret_kernels
from vllm_nbdiff.engine.loop import ForwardLoop
from vllm_nbdiff.engine.model_state import NBDiffModelState

interpret_kernels()

from vllm_nbdiff.engine import device  # noqa: E402 (the kernels must be interpreted first)

pytestmark = pytest.mark.usefixtures("device_references")

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
ON_DEVICE = {"nbdiff": {"decoder": "device"}}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: Any, golden_checkpoint: Any, make_llm: Callable[..., Any]) -> Iterator[Any]:
    llm = make_llm(golden_checkpoint, additional_config=ON_DEVICE, **ENGINES[request.param])
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
    """Engines that decide on the device and on the host."""
    sizes: dict[str, Any] = {"block_length": 8, "max_num_batched_tokens": 96, "max_model_len": 256}
    on_host = make_llm(golden_checkpoint, **sizes)
    # The last engine has the metrics.
    yield make_llm(golden_checkpoint, additional_config=ON_DEVICE, **sizes), on_host


def every_request() -> list[tuple[dict[str, Any], SamplingParams, bool]]:
    """Prompts and parameters of every kind; the last: whether the device decodes it."""
    sampled = {"temperature": 0.8, "seed": 5}
    kinds: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
        (options(), {}, True),
        (options(threshold=0.02, small_blocks=2), {}, True),
        (options(algorithm="entropy"), {}, True),
        (options(algorithm="margin"), {}, True),
        (options(algorithm="factor", threshold=3.0), {}, True),
        (options(algorithm="entropy_bound", threshold=6.0), {}, True),
        (options(algorithm="entropy_threshold", threshold=5.0), {}, True),
        (options(block_length=4, small_blocks=2), {}, True),
        ({"diffusion_max_steps": 3}, {}, True),
        (options(mode="ar"), {}, True),
        (options(mode="verify", draft_length=5), {}, True),
        (options(mode="verify", draft_length=8, draft_steps=2), {}, True),
        (options(), sampled, True),
        (options(), sampled | {"top_k": 20}, True),
        (options(), sampled | {"top_p": 0.7, "top_k": 50}, True),
        (options(), sampled | {"min_p": 0.02}, True),
        (options(mode="ar"), sampled, True),
        (options(mode="verify"), sampled | {"top_p": 0.9}, True),
        (options(algorithm="entropy"), sampled, False),
        (options(), sampled | {"min_p": 0.02, "top_p": 0.7}, False),
        (options(), {"repetition_penalty": 1.3}, False),
        (options(), {"logit_bias": {7: 5.0}}, False),
        (options(fused_commit=1), {}, False),
        (options(block_cache=1), {}, False),
        (options(algorithm="freedave"), {}, False),
    ]
    requests = []
    for i, (extra, params, on_device) in enumerate(kinds):
        prompt = {"prompt_token_ids": [(7 * i + 3 * j) % 500 for j in range(3 + 9 * i)]}
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": 21, "ignore_eos": True}
        settings |= {"detokenize": False, "extra_args": extra} | params
        requests.append((prompt, SamplingParams(**settings), on_device))
    return requests


def generate(llm: Any, requests: list[Any]) -> list[list[int]]:
    prompts, params = zip(*((prompt, params) for prompt, params, _ in requests), strict=True)
    return tokens_of(llm.generate(list(prompts), list(params), use_tqdm=False))


def test_every_option_gives_the_text_of_the_host(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in a batch that the device decodes, and in one that falls back to the host."""
    on_device, on_host = pair
    requests = every_request()
    expected = generate(on_host, requests)
    steps: list[int] = []
    step = device.DeviceDecoder.step
    monkeypatch.setattr(
        device.DeviceDecoder, "step", lambda self, logits: steps.append(1) or step(self, logits)
    )
    served = [i for i, (_, _, here) in enumerate(requests) if here]
    assert generate(on_device, [requests[i] for i in served]) == [expected[i] for i in served]
    assert steps
    steps.clear()
    others = [i for i, (_, _, here) in enumerate(requests) if not here]
    assert generate(on_device, [requests[i] for i in others]) == [expected[i] for i in others]
    assert not steps
    assert generate(on_device, requests) == expected
    assert steps  # the last requests to run are the device's again


def test_counts(pair: Any) -> None:
    on_device, _ = pair
    names = ("denoising_steps", "canvas_positions", "committed_tokens")
    before = [counter(on_device, f"vllm:diffusion_num_{name}") for name in names]
    params = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, detokenize=False,
        extra_args=options(threshold=1.0),
    )  # fmt: skip
    on_device.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    after = [counter(on_device, f"vllm:diffusion_num_{name}") for name in names]
    # Two blocks of a seed, 7 denoise steps of one position, and a commit.
    assert [b - a for a, b in zip(before, after, strict=True)] == [16, 128, 16]


def test_text_ends_at_the_models_length(pair: Any) -> None:
    for room in (1, 5, 8, 13):
        prompt = [(3 * j) % 500 for j in range(256 - room)]
        params = SamplingParams(
            temperature=0, max_tokens=64, ignore_eos=True, detokenize=False, extra_args=options()
        )
        here, there = (
            tokens_of(llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False))
            for llm in pair
        )
        assert here == there and len(here[0]) == room


class NoSynchronisation(TorchFunctionMode):
    """Raises where the host would wait for the device: a value or a shape that only it knows."""

    WAITS = (
        *("cpu", "item", "tolist", "numpy", "nonzero", "unique", "masked_select", "argwhere"),
        *("is_nonzero", "equal", "allclose", "__bool__", "__int__", "__float__", "__index__"),
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        assert name not in self.WAITS, f"{name} waits for the device"
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            flags = [i for i in index if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
            assert not flags, "an index of flags has a shape that only the device knows"
        if name == "repeat_interleave":
            assert "output_size" in kwargs, "repeat_interleave asks the device for its size"
        return func(*args, **kwargs)


def test_no_step_waits_for_the_device(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, sampled, verified; prompts, denoise steps and commits, kernels interpreted."""
    on_device, _ = pair
    with pytest.raises(AssertionError, match="item waits"), NoSynchronisation():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="flags"), NoSynchronisation():
        torch.ones(3)[torch.ones(3) > 0]
    calls = {"begin": 0, "step": 0}

    def guarded(name: str) -> Any:
        original = getattr(device.DeviceDecoder, name)

        def call(self: Any, argument: Any) -> Any:
            calls[name] += 1
            with NoSynchronisation():
                return original(self, argument)

        return call

    for name in calls:
        monkeypatch.setattr(device.DeviceDecoder, name, guarded(name))
    hollow_kernels(monkeypatch)
    requests = every_request()
    generate(on_device, [requests[i] for i in (0, 11, 14)])
    assert calls["begin"] == calls["step"] > 3


def hollow_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """References read values, which a kernel does on the device: let them, unguarded."""
    for name in (*ROW_KERNELS, *CANVAS_KERNELS):
        reference = getattr(device, name)

        def call(*args: Any, reference: Any = reference, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return reference(*args, **kwargs)

        monkeypatch.setattr(device, name, call)


def test_a_replayed_graph_is_followed_by_the_planned_forward(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full CUDA graph runs the runner's rows even where the host decodes rows of its own."""
    on_device, on_host = pair
    prepare = NBDiffModelState.prepare_attn

    def replayed(self: Any, batch: Any, mode: CUDAGraphMode, *args: Any, **kwargs: Any) -> Any:
        full = CUDAGraphMode.FULL if batch.num_draft_tokens == batch.num_tokens else mode
        return prepare(self, batch, full, *args, **kwargs)

    requests = every_request()
    expected = generate(on_host, requests)
    forwards: list[int] = []
    logits = ForwardLoop._logits
    monkeypatch.setattr(
        ForwardLoop, "_logits", lambda self, it: forwards.append(1) or logits(self, it)
    )
    monkeypatch.setattr(NBDiffModelState, "prepare_attn", replayed)
    assert generate(on_device, requests) == expected
    assert forwards
