# SPDX-License-Identifier: Apache-2.0
"""A short adaptation of a tiny model learns, resumes exactly and stops at a NaN."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_nbdiff.adapt.data import Collator, Example
from vllm_nbdiff.adapt.loss import LossOptions, adaptation_loss
from vllm_nbdiff.adapt.plot import loss_curves
from vllm_nbdiff.adapt.schedule import BlockGrowth, Schedule
from vllm_nbdiff.adapt.train import AdaptationTrainer

PAD, EOS, MASK = 0, 1, 2  # as in conftest.py
BLOCK_LENGTH = 8


def counting(number: int) -> list[Example]:
    """Answers that count up from the prompt's only token."""
    starts = [3 + i % 20 for i in range(number)]
    return [
        {"input_ids": [*range(start, start + 12), EOS], "prompt_length": 1, "tail_length": 0}
        for start in starts
    ]


def trainer(
    model: LlamaForCausalLM, folder: Path, steps: int, **arguments: Any
) -> AdaptationTrainer:
    rows = counting(960)
    return AdaptationTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            logging_steps=10,
            save_steps=20,
            use_cpu=True,
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=[rows[i : i + 8] for i in range(0, len(rows), 8)],
        data_collator=Collator(PAD, EOS, BLOCK_LENGTH),
        schedule=Schedule(BlockGrowth(interval=10, final=BLOCK_LENGTH), certainty_from=50),
        mask_token_id=MASK,
        loss_options=LossOptions(position_bias=4.0, certainty_weight=0.5),
    )


def masked_loss(model: LlamaForCausalLM) -> float:
    batch = Collator(PAD, EOS, BLOCK_LENGTH)([counting(20)])
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        losses = adaptation_loss(model, batch, BLOCK_LENGTH, MASK, LossOptions(), generator)
    return losses.masked.item()


def test_adaptation_lowers_the_masked_loss_and_logs_its_parts(
    tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    before = masked_loss(tiny_model)
    first = trainer(tiny_model, tmp_path, steps=80)
    first.train()
    assert masked_loss(tiny_model) < 0.5 * before
    logged = [entry for entry in first.state.log_history if "masked_loss" in entry]
    assert [entry["block_length"] for entry in logged] == [1, 2, 4, 8, 8, 8, 8, 8]
    assert ["certainty_loss" in entry for entry in logged] == [False] * 5 + [True] * 3
    loss_curves(first.state.log_history, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes()[1:4] == b"PNG"


class Interrupt(TrainerCallback):
    """Ctrl-C after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_and_resumed_is_uninterrupted(
    tiny_model: LlamaForCausalLM, tmp_path: Path, accumulation: int
) -> None:
    models = [copy.deepcopy(tiny_model) for _ in range(3)]
    options = {"gradient_accumulation_steps": accumulation}
    trainer(models[0], tmp_path / "whole", 60, **options).train()
    broken = trainer(models[1], tmp_path / "parts", 60, **options)
    broken.add_callback(Interrupt(47))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    torch.rand(7)  # the noise must not depend on how much randomness was used up
    last = get_last_checkpoint(str(tmp_path / "parts"))
    assert last is not None and last.endswith("checkpoint-40")
    trainer(models[2], tmp_path / "parts", 60, **options).train(resume_from_checkpoint=last)
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[2].state_dict()[name]), name


class Poison(TrainerCallback):
    """A NaN in the weights, or in a gradient, after so many steps."""

    def __init__(self, model: LlamaForCausalLM, step: int, what: str) -> None:
        self.model, self.step, self.what = model, step, what

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.step:
            return
        weight = self.model.lm_head.weight
        if self.what == "loss":
            weight.data[5] = torch.nan
        else:
            weight.register_hook(lambda gradient: gradient * torch.nan)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_keeps_the_last_good_checkpoint(
    tiny_model: LlamaForCausalLM, tmp_path: Path, what: str
) -> None:
    doomed = trainer(tiny_model, tmp_path, steps=60)
    doomed.add_callback(Poison(tiny_model, 43, what))
    with pytest.raises(FloatingPointError, match=rf"{what} is not finite at step 43; .*-40"):
        doomed.train()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-40")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-40")
    assert all(weight.isfinite().all() for weight in saved.state_dict().values())
