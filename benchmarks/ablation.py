# SPDX-License-Identifier: Apache-2.0
"""The paper's ablations in miniature: what each part of the recipe is worth.

    python -m benchmarks.ablation

From one causal checkpoint (trained first, if there is none), the same steps on the same batches
with the full recipe and with one part of it changed, several seeds each; every result is decoded by
the plain-transformers reference. Writes ``ablation.json``, ``.md`` and ``.png`` to
``benchmarks/results``. A finished run is kept in the work folder and not repeated.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from transformers import AutoTokenizer, LlamaForCausalLM, TrainingArguments, set_seed

from vllm_nbdiff.adapt import problems
from vllm_nbdiff.adapt.data import (
    Collator,
    Example,
    cut_at_block,
    encode,
    row_length,
    token_batches,
)
from vllm_nbdiff.adapt.loss import LossOptions
from vllm_nbdiff.adapt.schedule import BlockGrowth, Schedule
from vllm_nbdiff.adapt.train import AdaptationTrainer, losses_on
from vllm_nbdiff.families.family import ContextMask
from vllm_nbdiff.reference import Generation, generate, generate_ar

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BLOCK_LENGTH, THRESHOLD, SMALL_BLOCKS = 32, 0.9, 4
BATCH_TOKENS, LEARNING_RATE, MAX_TOKENS = 1024, 1.5e-3, 256
VARIANTS = {
    "full recipe": LossOptions(),
    "block-causal context": LossOptions(context="block-causal", ar_targets="seeds"),
    "without AR loss": LossOptions(ar_targets="seeds"),
    "without block growth": LossOptions(),
}
METRICS = {
    "diffusion_exact": "block diffusion, exact in %",
    "tpf": "tokens per forward",
    "ar_exact": "AR, exact in %",
    "masked_loss": "held-out masked loss in nats",
}


def length_of(example: Example) -> int:
    """Columns of a training row."""
    prompt = example["prompt_length"]
    return row_length(prompt, len(example["input_ids"]) - prompt, BLOCK_LENGTH)


def encoded(
    tokenizer: Any, drawn: Iterator[problems.Problem], context: ContextMask
) -> Iterator[Example]:
    """Problems as training examples."""
    for problem in drawn:
        question = {"role": "user", "content": problem.prompt}
        answer = {"role": "assistant", "content": problem.answer}
        yield cut_at_block(encode(tokenizer, [question, answer]), BLOCK_LENGTH, context)


def train(
    variant: str, seed: int, options: argparse.Namespace
) -> tuple[Any, Any, dict[str, float]]:
    """Model, tokenizer and held-out losses of one run."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options.causal)
    model = LlamaForCausalLM.from_pretrained(options.causal, attn_implementation="sdpa")
    grows, context = variant != "without block growth", VARIANTS[variant].context
    drawn = encoded(tokenizer, problems.training(1000 + seed), context)
    batches = token_batches(drawn, length_of, BATCH_TOKENS, seed)
    collate = Collator(tokenizer.pad_token_id, tokenizer.eos_token_id, BLOCK_LENGTH)
    trainer = AdaptationTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.work / "trainer"),
            max_steps=options.steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            adam_beta2=0.98,
            weight_decay=0.01,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_steps=50,
            seed=seed,
            use_cpu=True,
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=list(islice(batches, options.steps)),
        data_collator=collate,
        schedule=Schedule(
            BlockGrowth(
                interval=max(1, options.steps // 20),
                initial=1 if grows else BLOCK_LENGTH,
                final=BLOCK_LENGTH,
            ),
            certainty_from=options.steps,
        ),
        mask_token_id=tokenizer.mask_token_id,
        loss_options=VARIANTS[variant],
    )
    trainer.train()
    asked = encoded(tokenizer, iter(problems.held_out(options.problems)), context)
    held_out = list(token_batches(asked, length_of, BATCH_TOKENS, 0))
    mask = tokenizer.mask_token_id
    losses = losses_on(model, held_out, collate, BLOCK_LENGTH, mask, VARIANTS[variant])
    return model.eval(), tokenizer, losses


def answered(
    decode: Callable[[list[int]], Generation], tokenizer: Any, count: int
) -> tuple[float, float]:
    """Exact answers to held-out problems in percent, and tokens per forward."""
    right = tokens = forwards = 0
    for problem in problems.held_out(count):
        messages = [{"role": "user", "content": problem.prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        result = decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        answer = tokenizer.decode(result.token_ids, skip_special_tokens=True)
        right += problems.is_exact(problem, answer)
        tokens += len(result.token_ids)
        forwards += result.forwards - 1  # the prefill is not counted, as on the engine
    return 100 * right / count, tokens / forwards


def run(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score one variant."""
    model, tokenizer, losses = train(variant, seed, options)
    ends, mask = [tokenizer.eos_token_id], tokenizer.mask_token_id

    def diffusion(prompt: list[int]) -> Generation:
        return generate(
            model,
            prompt,
            max_tokens=MAX_TOKENS,
            mask_token_id=mask,
            eos_token_ids=ends,
            num_small_blocks=SMALL_BLOCKS,
            threshold=THRESHOLD,
            block_causal=VARIANTS[variant].context == "block-causal",
        )

    def ar(prompt: list[int]) -> Generation:
        return generate_ar(
            model, prompt, max_tokens=MAX_TOKENS, eos_token_ids=ends, mask_token_id=mask
        )

    exact, tpf = answered(diffusion, tokenizer, options.problems)
    ar_exact, _ = answered(ar, tokenizer, options.problems)
    scores = {"diffusion_exact": exact, "tpf": tpf, "ar_exact": ar_exact, **losses}
    return {"variant": variant, "seed": seed, **scores}


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    lines = [f"| variant | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 1) + "|"]
    for variant in VARIANTS:
        cells = []
        for metric in METRICS:
            values = [run[metric] for run in runs if run["variant"] == variant]
            digits = 3 if metric == "masked_loss" else 2 if metric == "tpf" else 1
            cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """One panel a metric: every seed a point, the mean a bar."""
    figure, panels = pyplot.subplots(1, len(METRICS), figsize=(13, 3.6), layout="constrained")
    for axes, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for row, variant in enumerate(VARIANTS):
            values = [run[metric] for run in runs if run["variant"] == variant]
            axes.barh(row, np.mean(values), color="0.85")
            axes.plot(values, [row] * len(values), "o", color="C0", markersize=4)
        axes.set(xlabel=label, yticks=range(len(VARIANTS)), yticklabels=[])
        axes.invert_yaxis()
    panels[0].set_yticklabels(VARIANTS)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="The paper's ablations in miniature.")
    parser.add_argument("--causal", type=Path, help="causal checkpoint; default: one in --work")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "ablation")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def causal_checkpoint(work: Path, threads: int) -> Path:
    """The causal stage of the bundled model, trained if it is not there."""
    folder = work / "causal-model"
    if not (folder / "config.json").exists():
        script = ROOT / "examples" / "train_nano.py"
        options = ["--causal-only", "--work", str(work), "--threads", str(threads)]
        subprocess.run([sys.executable, str(script), "--out", str(work), *options], check=True)
    return folder


def main() -> None:
    """Run what is missing; write table, plot and JSON."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    options.causal = options.causal or causal_checkpoint(options.work, options.threads)
    (options.work / "runs").mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(options.seeds):
        for variant in VARIANTS:
            kept = options.work / "runs" / f"{variant.replace(' ', '-')}-{seed}.json"
            if not kept.exists():
                kept.write_text(json.dumps(run(variant, seed, options)))
            runs.append(json.loads(kept.read_text()))
            print(json.dumps(runs[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "steps": options.steps,
        "batch_tokens": BATCH_TOKENS,
        "problems": options.problems,
        "threshold": THRESHOLD,
        "small_blocks": SMALL_BLOCKS,
    }
    result = {"settings": settings, "runs": runs}
    (options.out / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "ablation.md").write_text(table(runs))
    plot(runs, options.out / "ablation.png")
    print(table(runs))


if __name__ == "__main__":
    main()
