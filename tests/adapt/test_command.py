# SPDX-License-Identifier: Apache-2.0
"""The command adapts a causal checkpoint, also after a kill, to one that the engine serves."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.adapt.command import (
    BLOCK_LENGTH,
    MAX_TOKENS,
    STEPS,
    decode,
    engine_forwards,
    half_right,
    prompts,
    write_inputs,
)
from vllm_nbdiff.adapt import evaluate
from vllm_nbdiff.adapt.data import Batch
from vllm_nbdiff.adapt.loss import _forward
from vllm_nbdiff.reference import generate


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command's output, killed after its first checkpoint and started again."""
    folder = tmp_path_factory.mktemp("adapt")
    command = write_inputs(folder)
    with (folder / "log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not (folder / "out" / "trainer" / "checkpoint-40" / "trainer_state.json").exists():
            assert first.poll() is None and time.monotonic() < deadline, (
                folder / "log"
            ).read_text()
            time.sleep(0.05)
        first.kill()
        first.wait()
        again = subprocess.run(command, stdout=log, stderr=log, check=False)
    assert again.returncode == 0, (folder / "log").read_text()[-4000:]
    return folder / "out"


@pytest.fixture(scope="module")
def model(adapted: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(adapted, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def llm(adapted: Path, make_llm: Callable[..., Any]) -> Any:
    mask = json.loads((adapted / "config.json").read_text())["mask_token_id"]
    return make_llm(adapted, BLOCK_LENGTH, mask, skip_tokenizer_init=False)


def test_masked_loss_falls(adapted: Path) -> None:
    summary = json.loads((adapted / "adaptation.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["after"]["masked_loss"] < 0.6 * summary["before"]["masked_loss"]
    assert summary["after"]["ar_loss"] < 0.6 * summary["before"]["ar_loss"]
    assert (adapted / "losses.png").read_bytes()[1:4] == b"PNG"
    assert len((adapted / "evaluation.jsonl").read_text().splitlines()) == 30


def test_engine_serves_it_at_its_defaults(adapted: Path, model: LlamaForCausalLM, llm: Any) -> None:
    from vllm import SamplingParams

    asked = prompts(adapted, 4)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
    for ids, output in zip(asked, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == decode(adapted, model, ids).token_ids


def test_training_forward_has_the_engines_logits(
    adapted: Path, model: LlamaForCausalLM, llm: Any
) -> None:
    """Every denoise step of a request, with one position filled a step."""
    from vllm import SamplingParams

    config = json.loads((adapted / "config.json").read_text())
    mask, eos = config["mask_token_id"], config["eos_token_id"]
    (prompt,) = prompts(adapted, 1)
    seen: list[torch.Tensor] = []

    def watch(served: Any) -> None:
        original = served.compute_logits

        def compute(*args: Any, **kwargs: Any) -> Any:
            seen.append(original(*args, **kwargs).float().clone())
            return seen[-1]

        served.compute_logits = compute

    llm.apply_model(watch)
    extra = {"nbdiff_small_blocks": 1, "nbdiff_threshold": 1.0}
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, extra_args=extra)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    result = generate(
        model,
        prompt,
        max_tokens=32,
        mask_token_id=mask,
        eos_token_ids=[],
        block_length=BLOCK_LENGTH,
        num_small_blocks=1,
        threshold=1.0,
    )
    text = list(output.outputs[0].token_ids)
    assert text == result.token_ids and eos != mask

    compared = 0
    for state in states(result, mask):
        batch: Batch = {
            "input_ids": torch.tensor([prompt + text]),
            "prompt_padding": torch.tensor([0]),
            "tail_length": torch.tensor([0]),
            "answer_length": torch.tensor([32]),
            "answer_columns": torch.tensor(32),
        }
        with torch.inference_mode():
            logits, _ = _forward(model, batch, torch.tensor([state]), BLOCK_LENGTH)
        masked = [i for i, token in enumerate(state) if token == mask]
        ours = logits[0, [i - 1 for i in masked]]
        theirs = [rows[: len(masked), : ours.shape[1]] for rows in seen if len(rows) >= len(masked)]
        distance = min((ours - rows).abs().max().item() for rows in theirs)
        assert distance < 2e-4 * ours.abs().max().item(), len(masked)
        compared += 1
    assert compared == 2 * (BLOCK_LENGTH - 1)


def states(result: Any, mask: int) -> list[list[int]]:
    """The answer as the decoder saw it before each step: one block noised, the other clean."""
    canvas = [list(result.token_ids) for _ in range(2)]
    for block in range(2):
        start = block * BLOCK_LENGTH
        canvas[block][start + 1 : start + BLOCK_LENGTH] = [mask] * (BLOCK_LENGTH - 1)
    kept = []
    for step in result.steps:
        kept.append(list(canvas[step.block]))
        for position, token in zip(step.positions, step.token_ids, strict=True):
            canvas[step.block][step.block * BLOCK_LENGTH + position] = token
    return kept


def test_evaluation_counts_exact_answers_and_forwards(
    adapted: Path, model: LlamaForCausalLM, llm: Any
) -> None:
    """Two questions whose answers are what the model says, and two of which they are not."""
    answers = [decode(adapted, model, prompt) for prompt in prompts(adapted, 4)]
    asked = half_right(adapted, answers)
    exact, tpf = evaluate.score(llm, asked, MAX_TOKENS)
    assert exact == 50
    tokens = sum(len(answer.token_ids) for answer in answers)
    assert tpf == pytest.approx(tokens / sum(engine_forwards(answer) for answer in answers))
    with pytest.raises(Exception, match="nbdiff_small_blocks"):
        evaluate.score(llm, asked, MAX_TOKENS, {"nbdiff_small_blocks": 3})


def test_questions_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(3 * (json.dumps({"messages": talk}) + "\n"))
    assert evaluate.from_file(path, 2) == 2 * [evaluate.Question(talk[:1], "b")]
    path.write_text("")
    with pytest.raises(ValueError, match="empty"):
        evaluate.from_file(path, 2)
