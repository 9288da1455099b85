# SPDX-License-Identifier: Apache-2.0
"""Adapt a causal checkpoint: ``python -m vllm_nbdiff.adapt --model DIR --data FILE --out DIR``.

Every option of transformers' ``TrainingArguments`` is one of this command too (``--bf16``,
``--fsdp``, ``--report-to``, ...), and ``accelerate launch -m vllm_nbdiff.adapt`` runs it on several
devices. Run again with the same ``--out``, it goes on from its last checkpoint.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import HfArgumentParser, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_nbdiff.adapt import files
from vllm_nbdiff.adapt.checkpoint import ensure_mask_token, load, mark
from vllm_nbdiff.adapt.data import Collator
from vllm_nbdiff.adapt.lora import (
    ALL_LINEAR,
    act_on_drafts,
    add_adapter,
    served_mask_token,
)
from vllm_nbdiff.adapt.loss import LossOptions
from vllm_nbdiff.adapt.plot import loss_curves
from vllm_nbdiff.adapt.schedule import BlockGrowth, Schedule
from vllm_nbdiff.adapt.train import AdaptationTrainer, losses_on
from vllm_nbdiff.draft_only import mark_draft_only
from vllm_nbdiff.families.family import ContextMask

HELD_OUT = 200
"""Most lines that are set aside for the evaluation when no file is named for it."""
NOT_WITH_LORA = ("context", "threshold", "small_blocks")
"""Options of a checkpoint that is written; an adapter is served on one that exists."""
ONLY_WITH_LORA = ("lora_rank", "lora_alpha", "lora_targets", "draft_only")
DEFAULTS = {
    "max_steps": 1000,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "warmup_stable_decay",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 1,  # a batch of --batch-tokens
    "logging_steps": 10,
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class AdaptArguments:
    """What is adapted, and how; the training options beside it are transformers' own."""

    model: Path = field(metadata={"help": "causal checkpoint (llama, qwen2, qwen3, PanguEmbedded)"})
    data: Path = field(metadata={"help": "JSON lines with 'messages', or with 'text' to be packed"})
    out: Path = field(metadata={"help": "folder of the adapted checkpoint and trainer state"})
    eval_data: Path | None = field(
        default=None, metadata={"help": "the same for the evaluation; default: lines of --data"}
    )
    context: ContextMask = field(
        default="causal",
        metadata={"help": "of finished text: causal (NBDiff) or block-causal (Fast-dLLM v2)"},
    )
    lora: bool = field(
        default=False, metadata={"help": "train an adapter (PEFT) that --model serves as it is"}
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapter's matrices"})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "scale of the adapter, by its rank; default: 2 ranks"}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={"help": "names of the layers that it adapts; default: all linear ones"},
    )
    draft_only: bool = field(
        default=False,
        metadata={"help": "the adapter acts where tokens are drafted alone: no text changes"},
    )
    block_length: int = field(default=32, metadata={"help": "tokens denoised together, as served"})
    batch_tokens: int = field(default=8192, metadata={"help": "tokens of a device's batch"})
    max_length: int | None = field(
        default=None, metadata={"help": "longest sequence; default: the model's context"}
    )
    drop_long: bool = field(default=False, metadata={"help": "leave out longer conversations"})
    dtype: str = field(default="float32", metadata={"help": "of the weights in training"})
    attention: str = field(default="sdpa", metadata={"help": "sdpa or flex_attention (GPU)"})
    growth_interval: int | None = field(
        default=None, metadata={"help": "steps between two doublings; default: 1/20 of all"}
    )
    growth_start: int = field(default=0, metadata={"help": "step at which growth begins"})
    growth_initial: int = field(default=1, metadata={"help": "block length at step 0"})
    growth_ratio: int = field(default=2, metadata={"help": "factor of one growth"})
    ar_weight: float = field(default=0.5, metadata={"help": "factor of the AR loss"})
    weighting: str = field(
        default="uniform", metadata={"help": "uniform, inverse_t, or acceptance of drafts (D-PACE)"}
    )
    draft_share: float = field(
        default=0.0, metadata={"help": "share of blocks that are masked whole, as drafts begin"}
    )
    fan_out_share: float = field(default=0.0, metadata={"help": "of those, with no first token"})
    eos_padding_weight: float = field(
        default=0.1, metadata={"help": "weight of what follows the eos in its block"}
    )
    position_bias: float = field(
        default=0.0, metadata={"help": "mask later positions of a block more often; try 8"}
    )
    certainty_steps: int = field(
        default=0, metadata={"help": "last steps, with certainty-forcing for tokens per forward"}
    )
    certainty_weight: float = field(default=1.0, metadata={"help": "factor of that loss"})
    threshold: float | None = field(
        default=None, metadata={"help": "served nbdiff_threshold, for generation_config.json"}
    )
    small_blocks: int | None = field(default=None, metadata={"help": "served nbdiff_small_blocks"})
    eval_max_tokens: int = field(default=256, metadata={"help": "longest answer when evaluated"})
    skip_engine: bool = field(
        default=False, metadata={"help": "no evaluation of answers on the engine at the end"}
    )


def parse(arguments: list[str] | None = None) -> tuple[AdaptArguments, TrainingArguments]:
    """Command line. Exits with a message when an option is wrong."""
    parser = HfArgumentParser((AdaptArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(**DEFAULTS)
    options, training = parser.parse_args_into_dataclasses(arguments)
    if training.output_dir == "trainer_output":  # transformers' default
        training.output_dir = str(options.out / "trainer")
    if training.lr_scheduler_type == "warmup_stable_decay" and not training.lr_scheduler_kwargs:
        training.lr_scheduler_kwargs = {"num_decay_steps": max(1, training.max_steps * 2 // 5)}
    training.remove_unused_columns = False
    return options, training


def split(options: AdaptArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Lines to train on and lines to evaluate on."""
    lines = files.read(options.data)
    if options.eval_data is not None:
        return lines, files.read(options.eval_data)
    if len(lines) < 2:
        raise ValueError(f"{options.data} has one line: none is left for the evaluation")
    parts = lines.train_test_split(min(HELD_OUT, max(1, len(lines) // 20)), seed=seed)
    return parts["train"], parts["test"]


def check_lora(options: AdaptArguments) -> None:
    """Raises ValueError for an option that says nothing with, or without, ``--lora``, or with
    ``--draft-only``."""
    plain = AdaptArguments(options.model, options.data, options.out)
    for name in NOT_WITH_LORA if options.lora else ONLY_WITH_LORA:
        if getattr(options, name) != getattr(plain, name):
            flag, needed = "--" + name.replace("_", "-"), "without" if options.lora else "with"
            raise ValueError(f"{flag} applies {needed} --lora only")
    if options.draft_only and options.ar_weight != plain.ar_weight:
        raise ValueError("--ar-weight applies without --draft-only only: no causal row is adapted")


def prepare(options: AdaptArguments) -> tuple[Any, PreTrainedTokenizerBase, int]:
    """The model to train, its tokenizer and the id of its mask token."""
    check_lora(options)
    dtype, length = getattr(torch, options.dtype), options.block_length
    drafts = options.draft_only
    mask = served_mask_token(options.model, length, drafts) if options.lora else None
    model, tokenizer = load(options.model, dtype, options.attention, options.context)
    if mask is None:
        return model, tokenizer, ensure_mask_token(model, tokenizer)
    adapted = add_adapter(model, options.lora_rank, options.lora_alpha, options.lora_targets)
    if drafts:
        act_on_drafts(adapted)
    return adapted, tokenizer, mask


def growth_of(options: AdaptArguments, steps: int) -> BlockGrowth:
    """Block lengths of a run of so many steps.

    Raises:
        ValueError: If the grid of one of them would not be that of the whole text.
    """
    growth = BlockGrowth(
        interval=options.growth_interval or max(1, steps // 20),
        start=options.growth_start,
        initial=options.growth_initial,
        ratio=options.growth_ratio,
        final=options.block_length,
    )
    odd = next((n for n in map(growth, range(steps)) if growth.final % n), None)
    if options.context == "block-causal" and odd is not None:
        raise ValueError(
            f"--context block-causal: a block length of {odd} in training does not divide "
            f"--block-length {growth.final}; choose --growth-initial and --growth-ratio"
        )
    return growth


def losses_of(options: AdaptArguments) -> tuple[LossOptions, LossOptions]:
    """What is trained, and what is measured before and after."""
    measured = LossOptions(
        context=options.context, ar_targets="all" if options.context == "causal" else "seeds"
    )
    trained = replace(
        measured,
        ar_weight=options.ar_weight,
        weighting=options.weighting,  # type: ignore[arg-type]
        eos_padding_weight=options.eos_padding_weight,
        position_bias=options.position_bias,
        draft_share=options.draft_share,
        fan_out_share=options.fan_out_share,
        certainty_weight=options.certainty_weight if options.certainty_steps else 0.0,
    )
    return trained, measured


def adapt(options: AdaptArguments, training: TrainingArguments) -> None:
    """Train, save, evaluate.

    Raises:
        ValueError: For an option or data that cannot be used.
        FloatingPointError: When the training diverges; its last checkpoint stays.
    """
    steps, context = training.max_steps, options.context
    growth = growth_of(options, steps)
    trained_losses, measured_losses = losses_of(options)
    model, tokenizer, mask = prepare(options)
    limit = model.config.max_position_embeddings
    if options.max_length is not None and options.max_length > limit:
        raise ValueError(f"--max-length {options.max_length} exceeds the model's context, {limit}")
    length = options.block_length

    def batches(lines: datasets.Dataset) -> files.Batches:
        rows = files.tokenize(
            lines, tokenizer, length, options.max_length or limit, options.drop_long, context
        )
        return files.Batches(rows, length, options.batch_tokens, training.seed)

    with training.main_process_first():  # the others read what it cached
        train_lines, eval_lines = split(options, training.seed)
        trained, held_out = batches(train_lines), batches(eval_lines)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = Collator(pad, tokenizer.eos_token_id, length)
    trainer = AdaptationTrainer(
        model=model,
        args=training,
        train_dataset=trained,
        data_collator=collate,
        processing_class=tokenizer,
        schedule=Schedule(growth, certainty_from=steps - options.certainty_steps),
        mask_token_id=mask,
        loss_options=trained_losses,
    )
    before = losses_on(trainer.model, held_out, collate, length, mask, measured_losses)
    trainer.train(resume_from_checkpoint=get_last_checkpoint_of(training))
    after = losses_on(trainer.model, held_out, collate, length, mask, measured_losses)

    trainer.save_model(str(options.out))
    if not trainer.is_world_process_zero():
        return
    if options.draft_only:
        mark_draft_only(options.out)
    if not options.lora:
        served = {
            "nbdiff_threshold": options.threshold,
            "nbdiff_small_blocks": options.small_blocks,
        }
        defaults = {key: value for key, value in served.items() if value}
        mark(options.out, options.model, length, mask, defaults, context)
    loss_curves(trainer.state.log_history, options.out / "losses.png")
    summary = {"steps": trainer.state.global_step, "before": before, "after": after}
    (options.out / "adaptation.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))
    if "messages" in eval_lines.column_names:
        answers(options, eval_lines, training.world_size)


def get_last_checkpoint_of(training: TrainingArguments) -> str | None:
    """Where to go on from, if a run was interrupted."""
    folder = training.output_dir
    return get_last_checkpoint(folder) if folder and os.path.isdir(folder) else None


def answers(options: AdaptArguments, lines: datasets.Dataset, processes: int) -> None:
    """Ask the engine what was held out, in a process of its own: this one keeps its memory."""
    path = options.out / "evaluation.jsonl"
    lines.to_json(path)
    served = [options.model, "--lora", options.out] if options.lora else [options.out]
    command = [sys.executable, "-m", "vllm_nbdiff.adapt.evaluate", "--model", *map(str, served)]
    command += ["--data", str(path), "--out", str(options.out)]
    command += ["--max-tokens", str(options.eval_max_tokens)]
    if options.skip_engine or processes > 1:
        print("exact answers and tokens per forward:", " ".join(command))
        return
    subprocess.run(command, check=True)


if __name__ == "__main__":
    adapt(*parse())
