# SPDX-License-Identifier: Apache-2.0
"""`adapt --lora` trains an adapter of the bundled checkpoint, which serves it by name."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.adapt.command import MAX_TOKENS, NANO, prompts, questions, text
from tests.conftest import in_process
from tests.serving.server import NAME, serve
from vllm_nbdiff.adapt import evaluate, problems
from vllm_nbdiff.adapt.__main__ import adapt, parse, prepare
from vllm_nbdiff.adapt.data import Collator, encode
from vllm_nbdiff.adapt.lora import act_on_drafts
from vllm_nbdiff.adapt.loss import _forward
from vllm_nbdiff.adapt.noise import noise_blocks
from vllm_nbdiff.reference import Context, generate

COUNT = 4
WEIGHTS = "adapter_model.safetensors"
FLAGS = ("--enable-lora", "--max-lora-rank=8", "--dtype=float32")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained to say no more than the last word of an answer, twice."""
    folder = tmp_path_factory.mktemp("lora")
    with (folder / "data.jsonl").open("w") as data:
        for problem in islice(problems.training(0), 400):
            word = problem.answer.split()[-1]
            question = {"role": "user", "content": problem.prompt}
            answer = {"role": "assistant", "content": f"{word} {word}"}
            data.write(json.dumps({"messages": [question, answer]}) + "\n")
    return train(folder / "data.jsonl", folder / "out")


def train(data: Path, out: Path, *more: str) -> Path:
    """Train an adapter on `data`, into `out`; goes on from the last checkpoint there."""
    options = {
        "model": NANO,
        "data": data,
        "out": out,
        "batch-tokens": 1024,
        "max-steps": 40,
        "save-steps": 20,
        "learning-rate": 1e-2,
        "lora-rank": 8,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    adapt(*parse(["--lora", *words, *more, "--skip-engine", "--use-cpu"]))
    return out


@pytest.fixture(scope="module")
def merged(adapter: Path) -> PreTrainedModel:
    """The checkpoint with the adapter, by PEFT."""
    model = PeftModel.from_pretrained(load(), str(adapter))
    return model.merge_and_unload().eval()


def load() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(NANO, attn_implementation="sdpa").float().eval()


def greedy(model: PreTrainedModel) -> list[list[int]]:
    """Answers of the plain-transformers decoder at the checkpoint's defaults."""
    config = json.loads((NANO / "config.json").read_text())
    defaults = json.loads((NANO / "generation_config.json").read_text())
    return [
        generate(
            model,
            prompt,
            max_tokens=MAX_TOKENS,
            mask_token_id=config["mask_token_id"],
            eos_token_ids=[config["eos_token_id"]],
            block_length=config["block_length"],
            num_small_blocks=defaults["nbdiff_small_blocks"],
            threshold=defaults["nbdiff_threshold"],
        ).token_ids
        for prompt in prompts(NANO, COUNT)
    ]


@pytest.fixture(scope="module")
def drafts(adapter: Path) -> Path:
    """The same, draft-only, trained for acceptance."""
    words = ("--draft-only", "--weighting=acceptance", "--draft-share=0.5", "--block-length=16")
    return train(adapter.parent / "data.jsonl", adapter.parent / "drafts", *words)


def test_draft_only_acts_on_the_noised_half(drafts: Path) -> None:
    """There it is the merged model, on KV of the checkpoint; clean rows are the checkpoint's."""
    config = json.loads((drafts / "adapter_config.json").read_text())
    assert config["nbdiff_rows"] == "drafts"
    summary = json.loads((drafts / "adaptation.json").read_text())
    assert summary["after"]["masked_loss"] < 0.8 * summary["before"]["masked_loss"]
    assert summary["after"]["ar_loss"] == summary["before"]["ar_loss"]

    own, merged = load(), PeftModel.from_pretrained(load(), str(drafts)).merge_and_unload().eval()
    gated = PeftModel.from_pretrained(load(), str(drafts)).eval()
    act_on_drafts(gated)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    examples = [
        encode(tokenizer, [*question, {"role": "assistant", "content": answer}])
        for question, answer in zip(questions(2), ("12 12 pens", "3"), strict=True)
    ]
    batch = Collator(tokenizer.pad_token_id, tokenizer.eos_token_id, 4)([examples])
    columns = int(batch["answer_columns"])
    answer = batch["input_ids"][:, -columns:]
    noised = noise_blocks(answer, 4, tokenizer.mask_token_id).ids
    with torch.inference_mode():
        by_noised, by_clean = _forward(gated, batch, noised, 4)
        plain, expected = _forward(own, batch, noised, 4)
    # Nothing is added to clean rows; to others by other sums than those of merged weights, whose
    # rounding is far below what the adapter changes.
    torch.testing.assert_close(by_clean, expected)
    assert (by_noised - plain).abs().mean() > 0.1
    for row in range(len(answer)):
        context = Context(own)
        context.append(batch["input_ids"][row, batch["prompt_padding"][row] : -columns].tolist())
        for start in range(0, columns, 4):
            context.model = merged
            logits = context.look(noised[row, start : start + 4].tolist())[:-1]
            torch.testing.assert_close(by_noised[row, start : start + 3], logits, rtol=0, atol=1e-3)
            context.model = own
            context.append(answer[row, start : start + 4].tolist())


def test_adapter_alone_is_written(adapter: Path) -> None:
    summary = json.loads((adapter / "adaptation.json").read_text())
    assert summary["after"]["masked_loss"] < 0.5 * summary["before"]["masked_loss"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert set(config["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert (adapter / WEIGHTS).exists()
    assert not (adapter / "model.safetensors").exists() and not (adapter / "config.json").exists()


def test_interrupted_and_resumed_is_uninterrupted(adapter: Path, tmp_path: Path) -> None:
    """The optimizer, the order of the data and the noise go on where they were."""
    half = tmp_path / "out" / "trainer" / "checkpoint-20"
    shutil.copytree(adapter / "trainer" / "checkpoint-20", half)
    half_way = load_file(half / WEIGHTS)
    whole = load_file(adapter / WEIGHTS)
    resumed = load_file(train(adapter.parent / "data.jsonl", tmp_path / "out") / WEIGHTS)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not all(torch.equal(half_way[name], whole[name]) for name in whole)


def test_served_by_name(adapter: Path, merged: PreTrainedModel, tmp_path: Path) -> None:
    """Beside the checkpoint itself; a name that nothing has is HTTP 404."""
    expected = {NAME: greedy(load()), "brief": greedy(merged)}
    assert all(a != b for a, b in zip(*expected.values(), strict=True))
    with serve(tmp_path / "log", *FLAGS, f"--lora-modules=brief={adapter}") as server:
        client = server.client()

        def ask(name: str, messages: Any) -> list[int]:
            answer = client.chat.completions.create(
                model=name,
                messages=messages,
                temperature=0,
                max_tokens=MAX_TOKENS,
                extra_body={"return_token_ids": True},
            )
            choice: Any = answer.choices[0]
            return choice.token_ids

        for name, answers in expected.items():
            assert [ask(name, messages) for messages in questions(COUNT)] == answers
        with pytest.raises(openai.NotFoundError, match="other"):
            ask("other", questions(1)[0])


def test_evaluation_asks_the_adapter(adapter: Path, merged: PreTrainedModel) -> None:
    said = [text(NANO, answer) for answer in greedy(merged)]
    asked = [evaluate.Question(m, a) for m, a in zip(questions(COUNT), said, strict=True)]
    with in_process():
        llm = evaluate.engine(NANO, "NBDiffForCausalLM", adapter)
    assert evaluate.score(llm, asked, MAX_TOKENS, lora=adapter)[0] == 100
    assert evaluate.score(llm, asked, MAX_TOKENS)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-rank=8"], "--lora-rank applies with --lora only"),
        (["--lora", "--threshold=0.9"], "--threshold applies without --lora only"),
        (["--lora", "--context=block-causal"], "--context applies without --lora only"),
        (["--lora", "--block-length=16"], "--block-length 16 is not that of --model, 32"),
        (["--draft-only"], "--draft-only applies with --lora only"),
        (["--lora", "--draft-only", "--ar-weight=1"], "--ar-weight applies without --draft-only"),
        (["--lora", "--draft-only", "--block-length=64"], "--block-length 64 is more than"),
        (["--lora", "--draft-only", "--lora-targets", "embed_tokens"], "not .*embed_tokens"),
        (["--lora", "--draft-only", "--lora-targets", "lm_head"], "not .*lm_head"),
        (["--lora", "--lora-targets", "nothing"], "Target modules .*nothing.* not found"),
    ],
    ids=str,
)
def test_refused(words: list[str], message: str, tmp_path: Path) -> None:
    options, _ = parse([f"--model={NANO}", "--data=none", f"--out={tmp_path}", *words])
    with pytest.raises(ValueError, match=message):
        prepare(options)


def test_a_checkpoint_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    config = json.loads((NANO / "config.json").read_text())
    del config["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options, _ = parse([f"--model={tmp_path}", "--data=none", f"--out={tmp_path}", "--lora"])
    with pytest.raises(ValueError, match=r"set mask_token_id in its config\.json"):
        prepare(options)
