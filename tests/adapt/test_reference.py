# SPDX-License-Identifier: Apache-2.0
"""The plain-transformers decoder against token ids of the original NBDiff and Fast-dLLM code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vllm_nbdiff.reference import (
    Generation,
    Sampling,
    confidence_of,
    generate,
    generate_ar,
    keep_top_k,
    keep_top_p,
)

GOLDEN = Path(__file__).parents[1] / "golden"
DATA = json.loads((GOLDEN / "nbdiff_golden.json").read_text())
MASK, EOS = DATA["mask_token_id"], DATA["eos_token_id"]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        GOLDEN / "nbdiff_tiny_llama", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def decode(model: LlamaForCausalLM, case: dict[str, Any], **changes: Any) -> Generation:
    by_threshold = case["algorithm"] == "confidence_threshold"
    options = {
        "max_tokens": -(-len(case["expected"]) // case["block_length"]) * case["block_length"],
        "block_length": case["block_length"],
        "num_small_blocks": case["small_blocks"],
        "algorithm": "entropy" if case["algorithm"] == "entropy" else "confidence",
        "threshold": case["threshold"] if by_threshold else 1.0,
        "mask_token_id": MASK,
        "eos_token_ids": [EOS],
    } | changes
    return generate(model, case["prompt"], **options)


def name(case: dict[str, Any]) -> str:
    return (
        f"{case['algorithm']}-{case['threshold']}-L{case['block_length']}"
        f"-s{case['small_blocks']}-P{len(case['prompt'])}"
    )


@pytest.mark.parametrize("case", DATA["cases"], ids=name)
def test_matches_original_code(model: LlamaForCausalLM, case: dict[str, Any]) -> None:
    result = decode(model, case)
    assert result.token_ids == case["expected"]
    assert result.forwards == case["forwards"]


@pytest.fixture(scope="module")
def fast_dllm() -> Qwen2ForCausalLM:
    folder = GOLDEN / "fast_dllm_v2" / "tiny_a"
    keys = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen2"}
    config = Qwen2Config(**keys, attn_implementation="sdpa")
    return Qwen2ForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def test_block_causal_matches_the_code_of_fast_dllm(fast_dllm: Qwen2ForCausalLM) -> None:
    cases = json.loads((GOLDEN / "fast_dllm_v2" / "golden.json").read_text())["cases"]
    cases = [case for case in cases if not case["block_cache"]]
    for case in cases:
        result = generate(
            fast_dllm,
            case["prompt"],
            max_tokens=len(case["expected"]),
            mask_token_id=fast_dllm.config.mask_token_id,
            eos_token_ids=[case["eos_token_id"]],
            block_length=case["block_length"],
            num_small_blocks=case["small_blocks"],
            threshold=case["threshold"],
            block_causal=True,
        )
        assert result.token_ids == case["expected"], name(case)
    ends = {len(case["prompt"]) % case["block_length"] > 0 for case in cases}
    assert ends == {True, False} and any(len(c["prompt"]) < c["block_length"] for c in cases)


def test_every_position_but_the_seed_is_filled_once(model: LlamaForCausalLM) -> None:
    case = next(c for c in DATA["cases"] if c["threshold"] == 0.05 and c["block_length"] == 32)
    result = decode(model, case)
    filled = [(s.block, p) for s in result.steps for p in s.positions]
    assert sorted(filled) == [(b, p) for b in range(2) for p in range(1, 32)]
    for step in result.steps:
        best = max(step.confidence)
        others = [p for p, c in zip(step.probability, step.confidence, strict=True) if c < best]
        assert all(p > 0.05 for p in others)


def test_small_blocks_are_filled_left_to_right(model: LlamaForCausalLM) -> None:
    case = next(c for c in DATA["cases"] if c["small_blocks"] == 4 and c["block_length"] == 32)
    steps = decode(model, case).steps
    order = [(s.block, p // 8) for s in steps for p in s.positions]
    assert order == sorted(order)


def test_block_length_one_is_ar(model: LlamaForCausalLM) -> None:
    case = DATA["cases"][0]
    blocks = decode(model, case, block_length=1, num_small_blocks=1, max_tokens=24)
    ar = generate_ar(model, case["prompt"], max_tokens=24, eos_token_ids=[EOS], mask_token_id=MASK)
    assert blocks.token_ids == ar.token_ids
    assert ar.forwards == len(ar.token_ids)


def test_ar_agrees_with_transformers(model: LlamaForCausalLM) -> None:
    prompt = DATA["cases"][1]["prompt"]
    ours = generate_ar(model, prompt, max_tokens=24, eos_token_ids=[EOS]).token_ids
    theirs = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=EOS
    )
    assert ours == theirs[0, len(prompt) :].tolist()


def test_max_tokens_cuts_inside_a_block(model: LlamaForCausalLM) -> None:
    case = DATA["cases"][0]
    whole = decode(model, case).token_ids
    assert decode(model, case, max_tokens=13).token_ids == whole[:13]


def test_mask_token_is_never_drawn(model: LlamaForCausalLM) -> None:
    case = DATA["cases"][0]
    favourite = decode(model, case).token_ids[0]
    result = decode(model, case, mask_token_id=favourite)
    assert favourite not in result.token_ids


def test_margin_ranks_by_the_two_best_tokens() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    assert confidence_of(probabilities, 0, "margin") == pytest.approx(0.2)
    assert confidence_of(probabilities, 0, "confidence") == pytest.approx(0.5)
    expected = sum(p * torch.tensor(p).log().item() for p in (0.5, 0.3, 0.2))
    assert confidence_of(probabilities, 0, "entropy") == pytest.approx(expected)


def test_filters_keep_the_best_tokens() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    assert keep_top_p(logits, 0.5).isfinite().tolist() == [False, True, False]
    assert keep_top_p(logits, 0.7).isfinite().tolist() == [False, True, True]
    assert keep_top_p(logits, 1.0).isfinite().all()
    assert keep_top_k(logits, 2).isfinite().tolist() == [False, True, True]
    assert keep_top_k(logits, 9).isfinite().all()


def test_draws_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 3.0])
    sampling = Sampling(3, temperature=0.5, generator=torch.Generator().manual_seed(0))
    probabilities = sampling.probabilities(logits)
    expected = (torch.tensor([2.0, 1.0, 0.0]) / 0.5).softmax(0)
    torch.testing.assert_close(probabilities, torch.cat([expected, torch.zeros(1)]))
    draws = torch.tensor([sampling.draw(probabilities) for _ in range(4000)])
    share = torch.bincount(draws, minlength=4) / 4000
    assert (share - probabilities).abs().max() < 0.03


def test_seeded_sampling_repeats(model: LlamaForCausalLM) -> None:
    case = DATA["cases"][0]
    first, again, other = (
        decode(model, case, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (7, 7, 8)
    )
    assert first == again
    assert first.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_small_blocks": 3}, "num_small_blocks must divide"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"algorithm": "random"}, "algorithm"),
    ],
)
def test_bad_options_are_named(
    model: LlamaForCausalLM, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decode(model, DATA["cases"][0], **changes)
