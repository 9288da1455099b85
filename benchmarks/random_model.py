# SPDX-License-Identifier: Apache-2.0
"""A random 127M-parameter Llama whose tokens per forward are forced to a given average.

With threshold 1 a block of L tokens takes exactly `diffusion_max_steps` denoise steps, so requests
with two neighbouring numbers of steps, mixed, reach any average.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines import BLOCK_DIFFUSION, OPTIONS, Request

VOCAB_SIZE, MASK_TOKEN_ID, BLOCK_LENGTH = 32_000, 2, 32
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class StepMix:
    """`steps` denoise steps a block for most requests, one fewer for the share `fewer`."""

    steps: int
    fewer: float

    def of_request(self, index: int) -> int:
        """Steps of the index-th request: the shares hold for any run of requests, to within one."""
        takes_fewer = int((index + 1) * self.fewer + 0.5) > int(index * self.fewer + 0.5)
        return self.steps - takes_fewer


def find_step_mix(tpf: float, measure: Callable[[int], float]) -> StepMix:
    """The mix of steps a block whose forwards per token average 1 / `tpf`.

    What cannot be reached gives the closest that can.

    Args:
        tpf: wanted tokens per forward.
        measure: tokens per forward reached with a given number of steps a block, falling with it.
    """
    steps = min(max(1, round(BLOCK_LENGTH / tpf) - 1), BLOCK_LENGTH)
    while steps < BLOCK_LENGTH and measure(steps) > tpf:
        steps += 1
    while steps > 1 and measure(steps - 1) <= tpf:
        steps -= 1
    if steps == 1:
        return StepMix(1, 0.0)
    slow, fast = 1 / measure(steps), 1 / measure(steps - 1)
    return StepMix(steps, max(0.0, (slow - 1 / tpf) / (slow - fast)))


def find_chance(tokens: float, width: int) -> float:
    """Chance of a drafted token so that a verified draft of `width` gives `tokens` on average.

    Each is the seed, and the drafted tokens before the first wrong one.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if sum(middle**column for column in range(width)) < tokens
            else (low, middle)
        )
    return low


def build(folder: Path) -> None:
    """Write the checkpoint, bfloat16, to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=1792,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        max_position_embeddings=1024,
        # Tied, a random model's likeliest token after the mask is the mask itself.
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=MASK_TOKEN_ID,
        block_length=BLOCK_LENGTH,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def native_dtype() -> str:
    """`bfloat16` where the CPU computes in it, else `float32`, which is then much faster."""
    import torch

    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


class Random125M:
    """Rounds of random prompts of 32 tokens, all with the same number of tokens to generate."""

    name = "125m"

    def __init__(
        self, folder: Path, dtype: str, mix: StepMix, requests_per_round: int, max_tokens: int
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.mix = mix
        self.requests_per_round = requests_per_round
        self.max_tokens = max_tokens

    def requests(self, mode: str, batch: int, round_index: int) -> list[Request]:
        """The requests of one round; prompts differ between rounds and batch sizes."""
        rng = random.Random(f"{batch} {round_index}")
        return [
            self.request(rng, mode, self.mix.of_request(index))
            for index in range(max(self.requests_per_round, batch))
        ]

    def request(self, rng: random.Random, mode: str, steps: int) -> Request:
        """One request, with `steps` denoise steps a block where that is what the mode does."""
        from vllm import SamplingParams

        options = dict(OPTIONS.get(mode, {}))
        if mode in BLOCK_DIFFUSION:
            options |= {"nbdiff_threshold": 1.0, "diffusion_max_steps": steps}
        params = SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=options or None,
        )
        return Request([rng.randrange(3, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)], params)
