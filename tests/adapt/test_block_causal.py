# SPDX-License-Identifier: Apache-2.0
"""The command with a block-causal context: what it writes is served and evaluated as Fast-dLLM."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.adapt.command import (
    BLOCK_LENGTH,
    MAX_TOKENS,
    THRESHOLD,
    decode,
    engine_forwards,
    half_right,
    prompts,
    write_inputs,
)
from tests.conftest import tokens_of
from tests.families.engines import serve
from vllm_nbdiff.adapt import evaluate
from vllm_nbdiff.adapt.__main__ import growth_of, parse


@pytest.fixture(scope="module")
def block_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command's output with that context."""
    folder = tmp_path_factory.mktemp("block_causal")
    changes = {"context": "block-causal", "max-steps": 60, "batch-tokens": 512}
    command = write_inputs(folder, **changes)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "out"


def test_block_causal_is_served_as_fast_dllm(
    block_causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an engine that is told nothing; then evaluated, for which there is no AR."""
    from vllm import SamplingParams

    keys = json.loads((block_causal / "config.json").read_text()) | {"model_type": "llama"}
    model = LlamaForCausalLM.from_pretrained(
        block_causal, config=LlamaConfig(**keys, attn_implementation="sdpa")
    ).eval()
    llm = serve(block_causal, skip_tokenizer_init=False)

    whole = prompts(block_causal, 4)
    asked = [*whole, whole[0][:BLOCK_LENGTH], whole[1][: 2 * BLOCK_LENGTH], whole[2][:5]]
    assert any(len(ids) % BLOCK_LENGTH for ids in whole)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
    expected = [decode(block_causal, model, ids, block_causal=True) for ids in asked]
    assert tokens_of(outputs) == [answer.token_ids for answer in expected]
    assert len({token for answer in expected for token in answer.token_ids}) > 10

    architectures: list[str] = []

    def engine(folder: Path, architecture: str, lora: Path | None) -> Any:
        architectures.append(architecture)
        return llm

    monkeypatch.setattr(evaluate, "engine", engine)
    answers, tails = expected[:4], [len(ids) % BLOCK_LENGTH for ids in whole]
    talks = half_right(block_causal, answers)
    rows = evaluate.evaluate(block_causal, talks, MAX_TOKENS, [THRESHOLD], [BLOCK_LENGTH // 8])
    assert architectures == ["Fast_dLLM_QwenForCausalLM"]
    assert [row.threshold for row in rows] == [None, THRESHOLD]
    tokens = sum(len(answer.token_ids) for answer in answers)
    forwards = sum(map(engine_forwards, answers, tails))
    for row in rows:
        assert (row.exact, row.tpf) == (50, pytest.approx(tokens / forwards))


def test_block_causal_summary_has_no_ar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [evaluate.Score("default", 50, 2.0), evaluate.Score("one", 40, 3.0, 1, 0.9)]
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: rows)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", "m", "--out", str(tmp_path)])
    evaluate.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    nothing = {"ar_exact": None, "verify_tpf": None}
    assert summary == {**nothing, "diffusion_exact": 50, "diffusion_tpf": 2, "n": 300}
    assert (tmp_path / "curve.png").exists()


def test_growth_keeps_the_grid_of_a_block_causal_context(tmp_path: Path) -> None:
    words = ["--model=a", "--data=b", f"--out={tmp_path}", "--block-length=24"]
    options, _ = parse([*words, "--context=block-causal"])
    with pytest.raises(ValueError, match=r"block length of 16 in training does not divide .* 24"):
        growth_of(options, 1000)
    options, _ = parse([*words, "--context=block-causal", "--growth-initial=3"])
    assert growth_of(options, 1000)(999) == 24
    assert growth_of(parse(words)[0], 1000)(999) == 24
