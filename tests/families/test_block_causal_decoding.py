# SPDX-License-Identifier: Apache-2.0
"""Families without golden cases, against a literal decoder: whole forwards, no KV cache, float64.

Blocks at multiples of their length, the tail of a prompt in the first one, row i for position i.
Source: `generate_block` of Stable-DiffCoder; SDAR-MoE differs from it in the comparison alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from tests.conftest import options, tokens_of
from tests.families.checkpoints import checkpoint
from tests.families.engines import serve
from tests.families.oracles import ORACLES

BLOCK, MASK, EOS, LENGTH = 8, 255, 2, 40
PROMPTS = [[(17 * i + 5 * n) % 250 + 3 for i in range(n)] for n in (1, 5, 8, 13, 16, 30)]


def decode(
    logits_of: Callable[[Tensor, Tensor], Tensor], prompt: list[int], threshold: float, equal: bool
) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + LENGTH and EOS not in text[len(prompt) :]:
        start = len(text) // BLOCK * BLOCK
        text += [MASK] * (start + BLOCK - len(text))
        place = torch.arange(len(text)) // BLOCK
        while masked := [i for i in range(start, len(text)) if text[i] == MASK]:
            rows = logits_of(torch.tensor(text), place[:, None] >= place)[masked].softmax(-1)
            chance, token = rows.max(-1)
            above = (chance >= threshold if equal else chance > threshold) & (threshold < 1)
            above[chance.argmax()] = True
            for i, filled in zip(masked, torch.where(above, token, MASK).tolist(), strict=True):
                text[i] = filled
    new = text[len(prompt) :][:LENGTH]
    return new[: new.index(EOS) + 1] if EOS in new else new


@pytest.mark.parametrize("family", ["stable_diffcoder", "sdar_moe"])
def test_text(family: str, tmp_path: Path) -> None:
    """All in one batch, twice, the second time from the prefix cache."""
    folder = checkpoint(family, tmp_path)
    oracle = ORACLES[family](folder)
    cases: list[tuple[list[int], float]] = [(p, t) for p in PROMPTS for t in (0.05, 0.2, 1.0)]

    def logits_of(ids: Tensor, visible: Tensor) -> Tensor:
        return oracle(ids, visible, torch.float64)

    expected = [decode(logits_of, p, t, family == "stable_diffcoder") for p, t in cases]
    llm = serve(folder, hf_overrides={"block_length": BLOCK}, max_num_batched_tokens=64)
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt, _ in cases]
    params = [
        SamplingParams(
            temperature=0, max_tokens=LENGTH, detokenize=False,
            extra_args=options(algorithm="confidence", threshold=threshold),
        )
        for _, threshold in cases
    ]  # fmt: skip
    for _ in range(2):
        assert tokens_of(llm.generate(requests, params, use_tqdm=False)) == expected
    assert len({tuple(text) for text in expected}) > len(cases) // 2
