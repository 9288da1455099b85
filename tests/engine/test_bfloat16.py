# SPDX-License-Identifier: Apache-2.0
"""What a request asks for holds in bfloat16 too, where the best tokens are often the mask."""

from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams

from tests.conftest import options, tokens_of

VOCAB, MASK, LENGTH = 8, 7, 24
PROMPTS = [[(i * k + i) % MASK for i in range(n)] for k, n in enumerate([1, 9, 16, 30, 45, 61])]
KINDS = [
    options(),
    options(threshold=0.1, small_blocks=1),
    options(algorithm="margin"),
    options(algorithm="freedave"),
    options(mode="verify"),
    options(mode="ar"),
]


@pytest.fixture(scope="module", params=["dynamic", "static", "compiled and asynchronous"])
def llm(
    request: Any,
    make_checkpoint: Callable[..., Any],
    make_llm: Callable[..., Any],
    make_async_llm: Callable[..., Any],
) -> Any:
    folder, _ = make_checkpoint("llama", VOCAB, seed=5)
    compiled = request.param.startswith("compiled")
    yield (make_async_llm if compiled else make_llm)(
        folder,
        block_length=8,
        mask=MASK,
        max_model_len=128,
        dtype="bfloat16",
        block_size=32,
        enforce_eager=not compiled,
        additional_config={"nbdiff": {"static_shapes": request.param != "dynamic"}},
    )


def generate(llm: Any, words: list[list[int]] | None = None, **arguments: Any) -> list[Any]:
    """Texts of every prompt in every mode, in one batch."""
    prompts, params = [], []
    for prompt in PROMPTS:
        for extra in KINDS:
            one = SamplingParams(
                temperature=0, max_tokens=LENGTH, detokenize=False, extra_args=extra, **arguments
            )
            # With a tokenizer vLLM derives these from `bad_words`.
            one._bad_words_token_ids = words
            prompts.append({"prompt_token_ids": prompt})
            params.append(one)
    return tokens_of(llm.generate(prompts, params, use_tqdm=False))


def test_the_mask_is_never_generated(llm: Any) -> None:
    assert all(MASK not in text for text in generate(llm, ignore_eos=True))


def test_allowed_tokens(llm: Any) -> None:
    for text in generate(llm, allowed_token_ids=[1, 3, MASK], ignore_eos=True):
        assert len(text) == LENGTH and set(text) <= {1, 3}


def test_logit_bias(llm: Any) -> None:
    for text in generate(llm, logit_bias={0: -100, 2: -100, 4: -100, 5: -100}, ignore_eos=True):
        assert len(text) == LENGTH and set(text) <= {1, 3, 6}


def test_min_tokens(llm: Any) -> None:
    for text in generate(llm, min_tokens=15, stop_token_ids=[0, 1, 2]):
        assert len(text) >= 15 and not set(text[:15]) & {0, 1, 2, VOCAB - 2}


def test_bad_words(llm: Any) -> None:
    words = [[1, 3], [2, 2], [0], [4, 5, 4]]
    for text in generate(llm, words, ignore_eos=True):
        assert len(text) == LENGTH
        for word in words:
            spans = [text[i : i + len(word)] for i in range(LENGTH - len(word) + 1)]
            assert word not in spans


def test_step_maps(llm: Any) -> None:
    """Each step of a block fills something; who asks gets the text of who does not."""
    asked = [
        SamplingParams(
            temperature=0, max_tokens=LENGTH, ignore_eos=True, detokenize=False,
            extra_args=extra | options(step_map=1),
        )
        for _ in PROMPTS
        for extra in KINDS
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS for _ in KINDS]
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    assert tokens_of(outputs) == generate(llm, ignore_eos=True)
    for output, params in zip(outputs, asked, strict=True):
        steps = output.outputs[0].step_map
        assert len(steps) == LENGTH
        if "nbdiff_mode" in params.extra_args:
            assert steps == list(range(LENGTH))
            continue
        for first in range(0, LENGTH, 8):
            seed, *others = steps[first : first + 8]
            assert seed == -1 and set(others) == set(range(max(others) + 1))
