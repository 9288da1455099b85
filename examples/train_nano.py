# SPDX-License-Identifier: Apache-2.0
"""Train ``examples/nbdiff-nano`` from scratch on the CPU: tokenizer, causal model, adaptation.

    python examples/train_nano.py --out examples/nbdiff-nano

An interrupted run goes on from its last checkpoint when it is started again with the same
``--work`` folder.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve on a busy machine

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from vllm_nbdiff.adapt import problems
from vllm_nbdiff.adapt.checkpoint import mark
from vllm_nbdiff.adapt.data import Collator, Example, encode, row_length, token_batches
from vllm_nbdiff.adapt.loss import LossOptions
from vllm_nbdiff.adapt.schedule import BlockGrowth, Schedule
from vllm_nbdiff.adapt.train import AdaptationTrainer, CausalTrainer

BLOCK_LENGTH = 32
DRAFT_LENGTHS = (16, 32)  # in turns, those that `verify` and `auto` draft
SEEDS = {"adaptation": 1, "refinement": 2, "final": 6, "drafts": 42}  # of data, beside --seed
THRESHOLD, SMALL_BLOCKS = 0.99, 2  # served by default; see the figures in the model card
MAX_POSITIONS = 1024
VOCAB_SIZE = 768
SPECIAL_TOKENS = ["<|pad|>", "<|eos|>", "<|mask|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|user|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' + message['content'] + '<|eos|>' }}"
    "{%- else -%}{{ raise_exception('only the roles user and assistant are supported') }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
TWO_TURNS_SHARE = 0.1
ANYWHERE_SHARE = 0.2  # of the answers to drafts, which begin where a text broke off
CAUSAL_TOKENS, ADAPTATION_TOKENS = 1024, 1536
"""Tokens of a batch, padding included."""


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of words and whole numbers; every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = (
        text
        for problem in islice(problems.training(seed), 20_000)
        for text in (problem.prompt, problem.answer)
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of about 1.5 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.06,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def conversations(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Example]:
    """Endless tokenized conversations of one problem, some of two."""
    rng = Random(f"turns {seed}")
    stream = problems.training(seed)
    while True:
        messages = []
        for problem in islice(stream, 2 if rng.random() < TWO_TURNS_SHARE else 1):
            messages.append({"role": "user", "content": problem.prompt})
            messages.append({"role": "assistant", "content": problem.answer})
        yield encode(tokenizer, messages)


def begun_anywhere(examples: Iterator[Example], share: float, seed: int) -> Iterator[Example]:
    """``examples``, the answers of a share of which begin at any of their tokens but the last."""
    rng = Random(f"anywhere {seed}")
    for example in examples:
        prompt, length = example["prompt_length"], len(example["input_ids"])
        if rng.random() < share:
            prompt = rng.randrange(prompt, length - 1)
        yield {**example, "prompt_length": prompt}


def arguments(folder: Path, options: argparse.Namespace, **stage: Any) -> TrainingArguments:
    """Settings shared by both stages."""
    return TrainingArguments(
        output_dir=str(folder),
        warmup_steps=100,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=20,
        save_steps=500,
        per_device_train_batch_size=1,  # batch of batches
        save_total_limit=1,
        seed=options.seed,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        **stage,
    )


def fit(trainer: Trainer, folder: Path) -> None:
    """Train, from the folder's last checkpoint if there is one."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> None:
    """Teach the task to the causal model."""
    folder = options.work / "causal"

    def length(example: Example) -> int:
        return len(example["input_ids"])

    stream = conversations(tokenizer, options.seed)
    batches = token_batches(stream, length, CAUSAL_TOKENS, options.seed)
    trainer = CausalTrainer(
        model=model,
        args=arguments(
            folder,
            options,
            max_steps=options.causal_steps,
            learning_rate=3e-3,
        ),
        train_dataset=list(islice(batches, options.causal_steps)),
        data_collator=Collator(tokenizer.pad_token_id, tokenizer.eos_token_id, 1),
    )
    fit(trainer, folder)


def adapt(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> None:
    """Turn the causal model into a block-diffusion model, then refine it, then without the
    certainty loss, which costs exactness; at last teach it the drafts of mode ``verify``."""
    loss = LossOptions(position_bias=8.0, certainty_weight=1.0)
    steps, refining = options.steps, options.refining_steps
    growth = BlockGrowth(interval=max(1, steps // 30), final=BLOCK_LENGTH)
    schedule = Schedule(growth, certainty_from=steps * 4 // 5)
    _denoise(model, tokenizer, options, "adaptation", steps, 1.5e-3, schedule, loss)
    full = BlockGrowth(interval=1, initial=BLOCK_LENGTH, final=BLOCK_LENGTH)
    _denoise(model, tokenizer, options, "refinement", refining, 6e-4, Schedule(full, 0), loss)
    steps, loss = options.final_steps, LossOptions(position_bias=8.0)
    _denoise(model, tokenizer, options, "final", steps, 8e-4, Schedule(full, steps), loss)
    steps, loss = options.draft_steps, replace(loss, draft_share=0.6, fan_out_share=0.33)
    lengths = Schedule(lambda step: DRAFT_LENGTHS[step % len(DRAFT_LENGTHS)], steps)
    _denoise(model, tokenizer, options, "drafts", steps, 1.2e-3, lengths, loss, ANYWHERE_SHARE)


def _denoise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    options: argparse.Namespace,
    stage: str,
    steps: int,
    learning_rate: float,
    schedule: Schedule,
    loss: LossOptions,
    anywhere: float = 0.0,
) -> None:
    folder = options.work / stage
    seed = options.seed + SEEDS[stage]

    def length(example: Example) -> int:
        prompt = example["prompt_length"]
        return row_length(prompt, len(example["input_ids"]) - prompt, BLOCK_LENGTH)

    stream = begun_anywhere(conversations(tokenizer, seed), anywhere, seed)
    batches = token_batches(stream, length, ADAPTATION_TOKENS, seed)
    trainer = AdaptationTrainer(
        model=model,
        args=arguments(folder, options, max_steps=steps, learning_rate=learning_rate),
        train_dataset=list(islice(batches, steps)),
        data_collator=Collator(tokenizer.pad_token_id, tokenizer.eos_token_id, BLOCK_LENGTH),
        schedule=schedule,
        mask_token_id=tokenizer.mask_token_id,
        loss_options=loss,
    )
    fit(trainer, folder)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a checkpoint that names itself block-diffusion."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    served = {
        "do_sample": False,
        "nbdiff_threshold": THRESHOLD,
        "nbdiff_small_blocks": SMALL_BLOCKS,
    }
    mark(out, out, BLOCK_LENGTH, tokenizer.mask_token_id, served)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("build/nbdiff-nano"))
    parser.add_argument("--causal-steps", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=3600, help="of the adaptation")
    parser.add_argument("--refining-steps", type=int, default=1100)
    parser.add_argument("--final-steps", type=int, default=2200)
    parser.add_argument("--draft-steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--causal-only", action="store_true", help="stop before the adaptation")
    parser.add_argument("--restart", action="store_true", help="forget earlier checkpoints")
    return parser.parse_args()


def main() -> None:
    """Train and save."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.restart:
        shutil.rmtree(options.work, ignore_errors=True)
    tokenizer = build_tokenizer(options.seed)
    model = build_model(tokenizer)
    pretrain(model, tokenizer, options)
    save(model, tokenizer, options.work / "causal-model")
    if options.causal_only:
        return
    adapt(model, tokenizer, options)
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
