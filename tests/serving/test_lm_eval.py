# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness against the server: its scores are those of transformers and of `LLM`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from vllm import SamplingParams

from tests.serving.server import MODEL, NAME, Server

TASKS = Path(__file__).with_name("lm_eval_tasks")
PROBLEMS = [json.loads(line) for line in (TASKS / "problems.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def answers(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the harness got for each task and problem, and under `results` the scores."""
    out = tmp_path_factory.mktemp("lm_eval")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache")}
    reached = f"base_url={server.url}/v1/completions,tokenizer={MODEL},num_concurrent=4"
    subprocess.run(
        [
            str(Path(sys.executable).with_name("lm_eval")),
            *("--model", "local-completions", "--include_path", str(TASKS)),
            *("--model_args", f"model={NAME},tokenizer_backend=huggingface,{reached}"),
            *("--tasks", "nano_generate,nano_choose", "--output_path", str(out), "--log_samples"),
        ],
        cwd=TASKS,  # the data's path is relative
        env=os.environ | offline,
        check=True,
        timeout=300,
    )
    found: dict[str, Any] = {}
    for file in out.rglob("*.json*"):
        if file.name.startswith("results_"):
            found["results"] = json.loads(file.read_text())["results"]
        elif file.name.startswith("samples_"):
            samples = [json.loads(line) for line in file.read_text().splitlines()]
            samples.sort(key=lambda sample: sample["doc_id"])
            found[file.name.split("_2")[0].removeprefix("samples_")] = samples
    return found


def test_generation(answers: dict[str, Any], offline: Any) -> None:
    """Text by text, and so the share of exact answers, which is neither none nor all."""
    params = SamplingParams(temperature=0, max_tokens=42)  # as of the task, which cuts long ones
    prompts = [f"<|user|>{problem['question']}<|assistant|>" for problem in PROBLEMS]
    texts = [output.outputs[0].text for output in offline.generate(prompts, params, use_tqdm=False)]
    assert [sample["resps"][0][0] for sample in answers["nano_generate"]] == texts
    exact = sum(text == problem["answer"] for text, problem in zip(texts, PROBLEMS, strict=True))
    assert 0 < exact < len(texts)
    score = answers["results"]["nano_generate"]["exact_match,none"]
    assert score == pytest.approx(exact / len(texts))


def test_log_likelihood(answers: dict[str, Any]) -> None:
    """Of every choice, whether it is what greedy decoding gives, and the share of right ones."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = LlamaForCausalLM.from_pretrained(MODEL).double()
    right = 0
    for problem, sample in zip(PROBLEMS, answers["nano_choose"], strict=True):
        prompt = tokenizer.encode(f"<|user|>{problem['question']}<|assistant|>")
        scores = []
        for choice, ((found, is_greedy),) in zip(problem["choices"], sample["resps"], strict=True):
            answer = tokenizer.encode(choice)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            rows = logits.log_softmax(-1)
            scores.append(rows[range(len(answer)), answer].sum().item())
            assert float(found) == pytest.approx(scores[-1], abs=2e-5 * len(answer))
            assert (str(is_greedy) == "True") == (rows.argmax(-1).tolist() == answer)
        right += scores.index(max(scores)) == problem["right"]
    assert right > len(PROBLEMS) / 2
    assert answers["results"]["nano_choose"]["acc,none"] == pytest.approx(right / len(PROBLEMS))
