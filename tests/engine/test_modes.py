# SPDX-License-Identifier: Apache-2.0
"""Lossless modes give the text of AR decoding; fused commits that of separate ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.conftest import assert_follows, counter, in_process, tokens_of
from tests.engine.test_golden import request_of
from vllm_nbdiff.reference import Context

NANO = Path(__file__).parents[2] / "examples" / "nbdiff-nano"
LOSSLESS: list[dict[str, Any]] = [
    {"nbdiff_mode": "ar"},
    {"nbdiff_mode": "verify"},
    {"nbdiff_mode": "verify", "nbdiff_draft_length": 5, "nbdiff_draft_steps": 2},
    {"nbdiff_mode": "verify", "nbdiff_draft_length": 8, "nbdiff_fused_commit": 1},
    {"nbdiff_mode": "verify", "nbdiff_fan_out": 0},
    {"nbdiff_mode": "verify", "nbdiff_fan_out": 1, "nbdiff_draft_length": 32},
    {"nbdiff_mode": "verify", "nbdiff_fan_out": 16},
    {"nbdiff_mode": "auto"},
]
ENGINES = {
    "chunked": {"max_num_batched_tokens": 64},
    "preempted": {"max_model_len": 352, "num_gpu_blocks_override": 16, "block_size": 32},
    "one forward": {"additional_config": {"nbdiff": {"max_steps_per_schedule": 1}}},
}


@pytest.fixture(scope="module")
def ar_texts(golden_cases: list[dict[str, Any]], golden_checkpoint: Path) -> Any:
    """Prompts and what stock vLLM gives for them, decoding the same weights autoregressively."""
    from vllm import LLM

    prompts = [case["prompt"] for case in golden_cases if case["block_length"] == 32][:12]
    with in_process():
        llm = LLM(
            model=str(golden_checkpoint),
            hf_overrides={"architectures": ["LlamaForCausalLM"]},
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 28,
            max_model_len=512,
        )
    params = SamplingParams(
        temperature=0, max_tokens=45, detokenize=False, allowed_token_ids=list(range(511))
    )
    texts = tokens_of(
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    )
    del llm
    return prompts, texts


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("share", [len(ENGINES), pytest.param(1, marks=pytest.mark.long)])
def test_lossless_modes_are_ar_decoding(
    name: str,
    share: int,
    ar_texts: Any,
    golden_cases: list[dict[str, Any]],
    golden_checkpoint: Path,
    make_llm: Callable[..., Any],
) -> None:
    """Every mode in one batch, with block diffusion requests among them; some once more, from the
    prefix cache. Engines share the pairs of a prompt and a mode."""
    first = list(ENGINES).index(name)
    llm = make_llm(golden_checkpoint, block_length=32, **ENGINES[name])
    requests, params, expected = [], [], []
    for i, (prompt, text) in enumerate(zip(*ar_texts, strict=True), first):
        for extra in LOSSLESS[i % share :: share]:
            requests.append({"prompt_token_ids": prompt})
            params.append(
                SamplingParams(temperature=0, max_tokens=45, detokenize=False, extra_args=extra)
            )
            expected.append(text)
    cases = [case for case in golden_cases if case["block_length"] == 32]
    for case in cases[first % share :: share]:
        request, params_of_case = request_of(case)
        requests.append(request)
        params.append(params_of_case)
        expected.append(case["expected"])
    for own in (slice(None), slice(None, None, share)):
        given = tokens_of(llm.generate(requests[own], params[own], use_tqdm=False))
        assert [i for i, text in enumerate(given) if text != expected[own][i]] == []
    assert (counter(llm, "vllm:num_preemptions") > 0) == (name == "preempted")
    assert counter(llm, "vllm:diffusion_num_ar_steps") > 45


def test_fused_commits_change_forwards_only(
    golden_cases: list[dict[str, Any]], golden_checkpoint: Path, make_llm: Callable[..., Any]
) -> None:
    """A guessed seed that is right saves the forward of its block's commit; greedy and seeded."""
    llm = make_llm(golden_checkpoint, block_length=8)
    # One position a step: a block that ended in the forward that began it would end a step later.
    cases = [
        case
        for case in golden_cases
        if case["block_length"] == 8 and case["algorithm"] != "confidence_threshold"
    ]
    steps = "vllm:diffusion_num_denoising_steps"
    for sampling in ({"temperature": 0}, {"temperature": 0.3, "seed": 5}):
        requests, plain = zip(*(request_of(case) for case in cases), strict=True)
        plain = [params.clone() for params in plain]
        for params in plain:
            params.temperature, params.seed = sampling["temperature"], sampling.get("seed")
        fused = [params.clone() for params in plain]
        for params in fused:
            params.extra_args = {**params.extra_args, "nbdiff_fused_commit": 1}
        before = counter(llm, steps)
        texts = tokens_of(llm.generate(list(requests), plain, use_tqdm=False))
        separate = counter(llm, steps) - before
        hits = counter(llm, "vllm:diffusion_num_confirmed_seeds")
        before = counter(llm, steps)
        assert tokens_of(llm.generate(list(requests), fused, use_tqdm=False)) == texts
        hits = counter(llm, "vllm:diffusion_num_confirmed_seeds") - hits
        assert hits > 0 and counter(llm, steps) - before == separate - hits
    guesses = counter(llm, "vllm:diffusion_num_guessed_seeds")
    assert guesses > counter(llm, "vllm:diffusion_num_confirmed_seeds")


VOCAB, MASK, PROMPT, DRAWS = 6, 5, [1, 3, 0, 2], 3000


def ar_distribution(model: Any, temperature: float, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every text of `length` tokens after PROMPT, the mask token left out."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, weight in texts.items():
            logits = Context(model).append([*PROMPT, *text]).double()
            logits[MASK] = -torch.inf
            for token, chance in enumerate((logits / temperature).softmax(-1).tolist()):
                longer[(*text, token)] = weight * chance
        texts = {text: weight for text, weight in longer.items() if weight > 0}
    return texts


def test_sampled_verification_follows_the_ar_distribution(
    make_checkpoint: Callable[..., Any], make_llm: Callable[..., Any]
) -> None:
    folder, model = make_checkpoint("llama", VOCAB, seed=3, std=0.12)
    llm = make_llm(folder, block_length=4, mask=MASK, max_model_len=64, max_num_seqs=128)
    exact = ar_distribution(model, 1.0, 4)
    params = SamplingParams(
        n=DRAWS // 20, max_tokens=4, ignore_eos=True, detokenize=False, temperature=1.0,
        extra_args={"nbdiff_mode": "verify"},
    )  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * 20, params, use_tqdm=False)
    assert_follows(outputs, exact)

    # The same seed gives the same text, drafted or not, with constraints too.
    for extra in ({}, {"repetition_penalty": 1.3}, {"logit_bias": {2: 1.5}, "min_tokens": 6}):
        texts = []
        for options in [*LOSSLESS[:2], {"nbdiff_mode": "verify", "nbdiff_fused_commit": 1}]:
            params = SamplingParams(
                temperature=1.0, seed=11, max_tokens=24, detokenize=False, extra_args=options,
                **extra,
            )  # fmt: skip
            prompts = [{"prompt_token_ids": PROMPT[: 1 + i % 4]} for i in range(8)]
            texts.append(tokens_of(llm.generate(prompts, params, use_tqdm=False)))
        assert texts[0] == texts[1] == texts[2]
