# SPDX-License-Identifier: Apache-2.0
"""LoRA: an adapter's text is that of merged weights, in any batch, however rows are laid out."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest

from tests.adapters import LINEAR, weights_of, write_adapter
from tests.conftest import counter, options, tokens_of
from tests.engine.test_oracle import MASK, VOCAB
from tests.engine.test_static_shapes import STATIC, every_request
from vllm_nbdiff.reference import generate

Adapters = list[LoRARequest | None]
SIZES: dict[str, Any] = {"block_length": 8, "block_size": 32, "max_model_len": 256}
SIZES["kv_cache_memory_bytes"] = 1 << 26
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
ENGINES: dict[str, dict[str, Any]] = {
    # Requests of two adapters are never in one batch.
    "chunked": {"max_num_batched_tokens": 160, "max_loras": 1, "max_cpu_loras": 2},
    "static": {"max_num_batched_tokens": 160, "additional_config": STATIC},
    "asynchronous": {"max_num_batched_tokens": 320, "additional_config": STATIC},
    "preempted": {"num_gpu_blocks_override": 14},
}


@pytest.fixture(scope="module")
def checkpoints(golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """An adapter and its merged checkpoint each: none, one of linear layers, one of embeddings."""
    folder = tmp_path_factory.mktemp("adapters")
    linear = write_adapter(golden_checkpoint, folder / "linear", LINEAR)
    modules = ("q_proj", "v_proj", "embed_tokens", "lm_head")
    others = write_adapter(golden_checkpoint, folder / "others", modules, rank=4, seed=1)
    return [
        (None, golden_checkpoint),
        (LoRARequest("linear", 1, str(folder / "linear")), linear),
        (LoRARequest("others", 2, str(folder / "others")), others),
    ]


def run(llm: Any, requests: list[Any], adapters: Adapters) -> list[Any]:
    prompts, params = zip(*requests, strict=True)
    return llm.generate(list(prompts), list(params), lora_request=adapters, use_tqdm=False)


def scored() -> list[Any]:
    """Prompts of several lengths that are scored, and one token of text."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    return [({"prompt_token_ids": [(3 * j + n) % 500 for j in range(n)]}, params) for n in (5, 90)]


def scores(outputs: list[Any]) -> list[float]:
    """Log-probabilities of all tokens of prompts."""
    return [
        entry[token].logprob
        for output in outputs
        for entry, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
        if entry is not None
    ]


@pytest.fixture(scope="module")
def merged(checkpoints: list[Any], make_llm: Callable[..., Any]) -> list[Any]:
    """Texts of every request and scores of prompts, for each adapter, without LoRA."""
    answers = []
    for _, checkpoint in checkpoints:
        llm = make_llm(checkpoint, max_num_batched_tokens=160, **SIZES)
        requests, none = every_request(), [None] * 2
        texts = tokens_of(run(llm, requests, [None] * len(requests)))
        answers.append((texts, scores(run(llm, scored(), none))))
        del llm  # before the next one starts
    return answers


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: Any,
    merged: list[Any],
    golden_checkpoint: Path,
    make_llm: Callable[..., Any],
    make_async_llm: Callable[..., Any],
) -> Iterator[Any]:
    make = make_async_llm if request.param == "asynchronous" else make_llm
    yield request.param, make(golden_checkpoint, **SIZES, **LORA | ENGINES[request.param])


@pytest.mark.parametrize("shifts", [1, pytest.param(3, marks=pytest.mark.long)])
def test_every_option_beside_other_adapters(
    engine: Any, checkpoints: list[Any], merged: list[Any], shifts: int
) -> None:
    """All modes, greedy and seeded; each request with one adapter, which another engine gives
    another one, its neighbours with others."""
    name, llm = engine
    requests = every_request()
    first = list(ENGINES).index(name)
    for shift in range(first, first + shifts):
        chosen = [(i + shift) % 3 for i in range(len(requests))]
        texts = tokens_of(run(llm, requests, [checkpoints[c][0] for c in chosen]))
        wrong = [i for i, c in enumerate(chosen) if texts[i] != merged[c][0][i]]
        assert wrong == []
    assert (counter(llm, "vllm:num_preemptions") > 0) == (name == "preempted")


def test_adapters_matter(merged: list[Any]) -> None:
    """Else the test above could not fail."""
    plain, linear, others = (texts for texts, _ in merged)
    assert all(a != b != c != a for a, b, c in zip(plain, linear, others, strict=True))


def test_prompt_scores(engine: Any, checkpoints: list[Any], merged: list[Any]) -> None:
    """All in one batch."""
    _, llm = engine
    adapters = [adapter for adapter, _ in checkpoints for _ in scored()]
    given = scores(run(llm, 3 * scored(), adapters))
    expected = [score for _, own in merged for score in own]
    assert given == pytest.approx(expected, abs=1e-3)


def test_what_vllm_refuses(
    engine: Any, golden_checkpoint: Path, tmp_path: Path, checkpoints: list[Any], merged: list[Any]
) -> None:
    """By its own words; the engine goes on."""
    _, llm = engine
    write_adapter(golden_checkpoint, tmp_path / "wide", rank=16)
    with pytest.raises(ValueError, match="LoRA rank 16 is greater than max_lora_rank 8"):
        llm.llm_engine.add_lora(LoRARequest("wide", 3, str(tmp_path / "wide")))
    with pytest.raises(LoRAAdapterNotFoundError, match="nowhere"):
        llm.llm_engine.add_lora(LoRARequest("unknown", 4, str(tmp_path / "nowhere")))
    assert tokens_of(run(llm, every_request()[:1], [checkpoints[1][0]])) == merged[1][0][:1]


def test_bfloat16(golden_checkpoint: Path, make_llm: Callable[..., Any], tmp_path: Path) -> None:
    """An adapter that adds nothing changes nothing; exact merging has no meaning in bfloat16."""
    write_adapter(golden_checkpoint, tmp_path / "strong")
    write_adapter(golden_checkpoint, tmp_path / "empty", seed=1, strength=0)
    llm = make_llm(golden_checkpoint, **SIZES | LORA | {"dtype": "bfloat16"})
    adapters = (
        None,
        *(LoRARequest(n, i, str(tmp_path / n)) for i, n in ((1, "empty"), (2, "strong"))),
    )
    requests = every_request()[::3]
    plain, empty, strong = (
        tokens_of(run(llm, requests, [adapter] * len(requests))) for adapter in adapters
    )
    assert plain == empty
    assert all(a != b for a, b in zip(plain, strong, strict=True))


@pytest.mark.parametrize("model_type", ["PanguEmbedded", "qwen2", "qwen3"])
def test_backbone(
    model_type: str,
    make_checkpoint: Callable[..., Any],
    make_llm: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Of the plain-transformers decoder, beside requests without an adapter."""
    folder, model = make_checkpoint(model_type, VOCAB)
    merged = write_adapter(folder, tmp_path / "adapter")
    llm = make_llm(folder, mask=MASK, **SIZES | LORA)
    prompts = [[(7 * i + 3 * j) % (VOCAB - 2) for j in range(3 + 7 * i)] for i in range(4)]
    params = SamplingParams(
        temperature=0, max_tokens=20, detokenize=False,
        extra_args=options(threshold=0.5, small_blocks=1),
    )  # fmt: skip
    requests = [({"prompt_token_ids": prompt}, params) for prompt in prompts]
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    texts = tokens_of(run(llm, 2 * requests, [adapter] * 4 + [None] * 4))

    def expected() -> list[list[int]]:
        return [
            generate(
                model, prompt, max_tokens=20, mask_token_id=MASK, eos_token_ids=[VOCAB - 2],
                block_length=8, num_small_blocks=1, threshold=0.5,
            ).token_ids
            for prompt in prompts
        ]  # fmt: skip

    plain = expected()
    model.load_state_dict(weights_of(merged))
    assert texts == expected() + plain
