# SPDX-License-Identifier: Apache-2.0
"""What the command is run on in tests, and how what it wrote is decoded by plain transformers."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_nbdiff.adapt import evaluate, problems
from vllm_nbdiff.reference import Generation, generate

NANO = Path(__file__).parents[2] / "examples" / "nbdiff-nano"
BLOCK_LENGTH, STEPS, MAX_TOKENS, THRESHOLD = 16, 120, 60, 0.5


def write_inputs(folder: Path, **changes: Any) -> list[str]:
    """A causal checkpoint that was never trained and 600 conversations; the command's words."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.06,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "causal")
    tokenizer.save_pretrained(folder / "causal")
    with (folder / "data.jsonl").open("w") as data:
        for problem in islice(problems.training(0), 600):
            question = {"role": "user", "content": problem.prompt}
            answer = {"role": "assistant", "content": problem.answer}
            data.write(json.dumps({"messages": [question, answer]}) + "\n")
    options = {
        "model": folder / "causal",
        "data": folder / "data.jsonl",
        "out": folder / "out",
        "block-length": BLOCK_LENGTH,
        "batch-tokens": 1024,
        "max-steps": STEPS,
        "learning-rate": 1e-2,
        "position-bias": 4,
        "certainty-steps": 20,
        "threshold": THRESHOLD,
        "save-steps": 40,
    } | changes
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "vllm_nbdiff.adapt", *words, "--skip-engine", "--use-cpu"]


def questions(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": p.prompt}] for p in problems.held_out(count)]


def prompts(model_folder: Path, count: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    texts = tokenizer.apply_chat_template(
        questions(count), add_generation_prompt=True, tokenize=False
    )
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def decode(
    folder: Path, model: LlamaForCausalLM, prompt: list[int], block_causal: bool = False
) -> Generation:
    """The reference's answer at the served defaults."""
    config = json.loads((folder / "config.json").read_text())
    return generate(
        model,
        prompt,
        max_tokens=MAX_TOKENS,
        mask_token_id=config["mask_token_id"],
        eos_token_ids=[config["eos_token_id"]],
        block_length=BLOCK_LENGTH,
        num_small_blocks=BLOCK_LENGTH // 8,
        threshold=THRESHOLD,
        block_causal=block_causal,
    )


def text(folder: Path, token_ids: list[int]) -> str:
    """As vLLM gives it, without a character whose last bytes are missing, and stripped."""
    said = AutoTokenizer.from_pretrained(folder).decode(token_ids, skip_special_tokens=True)
    return said.rstrip("\N{REPLACEMENT CHARACTER}").strip()


def half_right(folder: Path, answers: list[Generation]) -> list[evaluate.Question]:
    """Questions, of which the first half has these answers."""
    said = [text(folder, answer.token_ids) for answer in answers]
    half = len(said) // 2
    kept = said[:half] + ["never said"] * (len(said) - half)
    return [
        evaluate.Question(messages, answer)
        for messages, answer in zip(questions(len(said)), kept, strict=True)
    ]


def engine_forwards(answer: Generation, tail: int = 0) -> int:
    """Steps and commits, but of the last block only the steps up to its last returned token."""
    last, end = divmod(tail + len(answer.token_ids) - 1, BLOCK_LENGTH)
    own = [step for step in answer.steps if step.block == last]
    needed = [i for i, step in enumerate(own, start=1) if min(step.positions) <= end]
    return sum(step.block < last for step in answer.steps) + last + max(needed, default=1)
