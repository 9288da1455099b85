# SPDX-License-Identifier: Apache-2.0
"""LoRA in every family that takes it: the text of merged weights, in plain PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.adapters import write_adapter
from tests.conftest import GOLDEN, options, tokens_of
from tests.families.checkpoints import checkpoint
from tests.families.engines import serve
from tests.families.oracles import ORACLES, config_of
from tests.families.test_block_causal_decoding import BLOCK, EOS, LENGTH, decode
from tests.families.test_options import start
from vllm_nbdiff.reference import generate

PROMPTS = [[(17 * i + 5 * n) % 130 + 110 for i in range(n)] for n in (1, 13, 30)]
Decoder = Callable[[list[int]], list[int]]


def block_causal(family: str, folder: Path) -> Decoder:
    oracle = ORACLES[family](folder)

    def logits_of(ids: Tensor, visible: Tensor) -> Tensor:
        return oracle(ids, visible, torch.float64)

    return lambda prompt: decode(logits_of, prompt, 0.2, family == "stable_diffcoder")


def autoregressive(family: str, folder: Path) -> Decoder:
    oracle = ORACLES[family](folder)

    def decoded(prompt: list[int]) -> list[int]:
        text = list(prompt)
        while len(text) < len(prompt) + LENGTH and EOS not in text[len(prompt) :]:
            causal = torch.ones(len(text), len(text)).tril().bool()
            text.append(int(oracle(torch.tensor(text), causal, torch.float64)[-1].argmax()))
        return text[len(prompt) :]

    return decoded


def fast_dllm(family: str, folder: Path) -> Decoder:
    config = config_of(folder) | {"model_type": "qwen2"}
    model = Qwen2ForCausalLM.from_pretrained(folder, config=Qwen2Config(**config)).eval()
    return lambda prompt: generate(
        model, prompt, max_tokens=LENGTH, mask_token_id=config["mask_token_id"],
        eos_token_ids=[EOS], block_length=BLOCK, num_small_blocks=1, threshold=0.2,
        block_causal=True,
    ).token_ids  # fmt: skip


CASES: dict[str, tuple[Callable[[str, Path], Decoder], dict[str, Any]]] = {
    "nemotron_labs_diffusion": (autoregressive, options(mode="verify")),
    "sdar": (block_causal, options(algorithm="confidence", threshold=0.2)),
    "stable_diffcoder": (block_causal, options(threshold=0.2)),
    "fast_dllm_v2": (fast_dllm, options(threshold=0.2, small_blocks=1)),
}


@pytest.mark.parametrize("family", CASES)
def test_text(family: str, tmp_path: Path) -> None:
    """With the adapter and without it, in one batch."""
    folder = checkpoint(family, tmp_path / "plain")
    merged = write_adapter(folder, tmp_path / "adapter")
    decoder, extra = CASES[family]
    decoders = [decoder(family, path) for path in (merged, folder)]
    expected = [decoded(prompt) for decoded in decoders for prompt in PROMPTS]
    llm = serve(
        folder,
        hf_overrides={"block_length": BLOCK},
        max_num_batched_tokens=64,
        enable_lora=True,
        max_lora_rank=8,
    )
    params = SamplingParams(
        temperature=0, max_tokens=LENGTH, detokenize=False, ignore_eos=True,
        stop_token_ids=[EOS], extra_args=extra,
    )  # fmt: skip
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in 2 * PROMPTS]
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    adapters = [adapter] * len(PROMPTS) + [None] * len(PROMPTS)
    outputs = llm.generate(requests, params, lora_request=adapters, use_tqdm=False)
    assert tokens_of(outputs) == expected
    assert all(a != b for a, b in zip(expected, expected[len(PROMPTS) :], strict=False))


def test_experts_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="--enable-lora is not supported on a CPU with a model"):
        start(GOLDEN / "llada2" / "tiny_a", 8, enable_lora=True)
