# SPDX-License-Identifier: Apache-2.0
"""Sampled blocks follow the reference's distribution, enumerated exactly."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.conftest import assert_follows
from vllm_nbdiff.reference import Context

VOCAB, MASK, LENGTH = 6, 5, 4
PROMPT = [1, 3, 0, 2]
DRAWS = 3000
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7, "threshold": 1.0, "small_blocks": 1},
    "top_p": {"temperature": 1.0, "top_p": 0.8, "threshold": 0.5, "small_blocks": 1},
    "top_k": {"temperature": 1.2, "top_k": 3, "threshold": 0.6, "small_blocks": 2},
    "both": {"temperature": 1.3, "top_k": 3, "top_p": 0.8, "threshold": 0.6, "small_blocks": 1},
}


def distribution(logits: torch.Tensor, settings: dict[str, Any]) -> list[float]:
    """softmax(top_p(top_k(logits / T))) without the mask token, in float64."""
    logits = logits.double().clone()
    logits[MASK] = -torch.inf
    probs = (logits / settings["temperature"]).softmax(-1)
    best, order = probs.sort(descending=True)
    best[settings.get("top_k", VOCAB) :] = 0
    best /= best.sum()
    best[best.cumsum(0) - best >= settings.get("top_p", 1)] = 0
    return (torch.zeros_like(probs).scatter(0, order, best) / best.sum()).tolist()


def enumerate_blocks(model: Any, settings: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Probability of every first block after PROMPT."""
    context = Context(model)
    seed = distribution(context.append(PROMPT), settings)
    states: dict[tuple[int, ...], float] = {
        (token, MASK, MASK, MASK): p for token, p in enumerate(seed) if p > 0
    }
    sub = LENGTH // settings["small_blocks"]
    finished: dict[tuple[int, ...], float] = defaultdict(float)
    while states:
        following: dict[tuple[int, ...], float] = defaultdict(float)
        for canvas, weight in states.items():
            masked = [i for i, token in enumerate(canvas) if token == MASK]
            if not masked:
                finished[canvas] += weight
                continue
            active = [i for i in masked if i // sub == masked[0] // sub]
            logits = context.look(list(canvas))
            rows = [distribution(logits[i - 1], settings) for i in active]
            choices = [[(t, p) for t, p in enumerate(row) if p > 0] for row in rows]
            for drawn in itertools.product(*choices):
                best = max(range(len(active)), key=lambda i: drawn[i][1])
                filled = list(canvas)
                chance = weight
                for i, (token, p) in enumerate(drawn):
                    chance *= p
                    if i == best or p > settings["threshold"]:
                        filled[active[i]] = token
                following[tuple(filled)] += chance
        states = following
    return finished


@pytest.fixture(scope="module")
def served(make_checkpoint: Callable[..., Any], make_llm: Callable[..., Any]) -> tuple[Any, Any]:
    folder, model = make_checkpoint("llama", VOCAB, seed=3, std=0.12)
    llm = make_llm(folder, block_length=LENGTH, mask=MASK, max_model_len=64, max_num_seqs=128)
    return llm, model


def enumerate_texts(model: Any, settings: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Probability of every text of LENGTH tokens after PROMPT, one token after the other."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        following = {}
        for text, weight in texts.items():
            chances = distribution(Context(model).append([*PROMPT, *text]), settings)
            following |= {(*text, t): weight * p for t, p in enumerate(chances) if p > 0}
        texts = following
    return texts


def draw(llm: Any, settings: dict[str, Any], **options: Any) -> list[Any]:
    """DRAWS texts of LENGTH tokens after PROMPT."""
    params = SamplingParams(
        n=DRAWS // 20,
        max_tokens=LENGTH,
        ignore_eos=True,
        detokenize=False,
        temperature=settings["temperature"],
        top_p=settings.get("top_p", 1.0),
        top_k=settings.get("top_k", 0),
        extra_args={f"nbdiff_{name}": value for name, value in options.items()},
    )
    return llm.generate([{"prompt_token_ids": PROMPT}] * 20, params, use_tqdm=False)


@pytest.mark.parametrize("name", SETTINGS)
def test_block_frequencies(served: tuple[Any, Any], name: str) -> None:
    llm, model = served
    settings = SETTINGS[name]
    exact = enumerate_blocks(model, settings)
    assert abs(sum(exact.values()) - 1) < 1e-9
    options = {key: settings[key] for key in ("threshold", "small_blocks")}
    assert_follows(draw(llm, settings, **options), exact)


@pytest.mark.parametrize("mode", ["ar", "verify"])
def test_text_frequencies(served: tuple[Any, Any], mode: str) -> None:
    """The modes that keep the autoregressive distribution, with the filters in vLLM's order:
    top_p first would give other texts too."""
    llm, model = served
    exact = enumerate_texts(model, SETTINGS["both"])
    assert abs(sum(exact.values()) - 1) < 1e-9
    assert_follows(draw(llm, SETTINGS["both"], mode=mode), exact)


def test_seeded_requests_do_not_depend_on_their_batch(served: tuple[Any, Any]) -> None:
    llm, _ = served

    def params(seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=1.0, seed=seed, max_tokens=18, ignore_eos=True, detokenize=False
        )

    prompts = [{"prompt_token_ids": PROMPT[: 1 + i % 4]} for i in range(40)]
    together = llm.generate(prompts, [params(i) for i in range(40)], use_tqdm=False)
    texts = [tuple(output.outputs[0].token_ids) for output in together]
    assert len(set(texts)) > 30
    for i in (0, 7, 22, 39):
        (alone,) = llm.generate([prompts[i]], params(i), use_tqdm=False)
        assert tuple(alone.outputs[0].token_ids) == texts[i]
    several_params = params(3)
    several_params.n = 3
    (several,) = llm.generate([prompts[3]], several_params, use_tqdm=False)
    assert len({tuple(c.token_ids) for c in several.outputs}) == 3
