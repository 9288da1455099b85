# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel 2 gives the reference's tokens, on vLLM's own executor and on Ray's.

Each runs in a process of its own: vLLM chooses the platform once a process, and Ray's executor
needs one that pretends to have devices (`cpu_for_ray`).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer

from tests import reasoning_parser
from tests.conftest import GOLDEN
from tests.families.test_golden import cases_of
from tests.families.test_golden import request_of as family_request_of

HERE = Path(__file__).parent
NANO = HERE.parents[1] / "examples" / "nbdiff-nano"
ALGORITHMS = {"origin": "confidence", "confidence_threshold": "confidence", "entropy": "entropy"}
BLOCK_LENGTH = 8
LOSSLESS = ("ar", "verify", "auto")


@pytest.fixture(scope="module")
def platform_plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which vLLM finds `cpu_for_ray` installed."""
    site = tmp_path_factory.mktemp("site")
    installed = site / "cpu_for_ray-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-for-ray\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\ncpu_for_ray = cpu_for_ray:activate\n"
    )
    return f"{site}{os.pathsep}{HERE / 'cpu_for_ray'}"


def request_of(case: dict[str, Any]) -> dict[str, Any]:
    """One of NBDiff's golden cases for `generate_tp2.py`."""
    has_threshold = case["algorithm"] == "confidence_threshold"
    options = {
        "nbdiff_algorithm": ALGORITHMS[case["algorithm"]],
        "nbdiff_threshold": case["threshold"] if has_threshold else 1.0,
        "nbdiff_small_blocks": case["small_blocks"],
    }
    params = {"temperature": 0, "max_tokens": 32, "detokenize": False, "extra_args": options}
    return {"prompt": case["prompt"], "params": params}


def lossless_request(prompt: list[int], mode: str) -> dict[str, Any]:
    """`verify` with drafts behind break points."""
    options = {"nbdiff_mode": mode, **({"nbdiff_fan_out": 2} if mode == "verify" else {})}
    params = {"temperature": 0, "max_tokens": 48, "ignore_eos": True, "detokenize": False}
    return {"prompt": prompt, "params": params | {"extra_args": options}}


def generate(
    arguments: list[str], requests: list[dict[str, Any]], **environment: str
) -> tuple[list[list[int]], str]:
    """Tokens of the requests and what was logged, from `generate_tp2.py ARGUMENTS`."""
    # By default each worker wants cores of its own, which a small machine does not have.
    nobind = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    run = subprocess.run(
        [sys.executable, str(HERE / "generate_tp2.py"), *arguments],
        input=json.dumps(requests),
        env={**os.environ, **nobind, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    answers = [line for line in run.stdout.splitlines() if line.startswith("[[")]
    assert run.returncode == 0 and len(answers) == 1, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(answers[0]), run.stderr


@pytest.mark.parametrize(
    ("executor", "shapes"),
    [
        pytest.param("mp", "dynamic", marks=pytest.mark.long),
        ("ray", "dynamic"),
        ("mp", "static"),
    ],
)
def test_golden_with_two_workers(
    executor: str,
    shapes: str,
    platform_plugin: str,
    golden_checkpoint: Path,
    golden_cases: list[dict[str, Any]],
) -> None:
    cases = [case for case in golden_cases if case["block_length"] == BLOCK_LENGTH]
    overrides = {
        "architectures": ["NBDiffForCausalLM"],
        "block_length": BLOCK_LENGTH,
        "mask_token_id": 511,
    }
    tokens, log = generate(
        [executor, shapes, str(golden_checkpoint), json.dumps(overrides)],
        [request_of(case) for case in cases]
        + [lossless_request(case["prompt"], mode) for mode in LOSSLESS for case in cases[:4]],
        **({"PYTHONPATH": platform_plugin} if executor == "ray" else {}),
    )
    assert tokens[: len(cases)] == [case["expected"] for case in cases]
    # What `auto` measures differs between workers; its choices, and so the forwards, must not.
    ar, verify, auto = (tokens[len(cases) + 4 * i :][:4] for i in range(3))
    assert ar == verify == auto and all(len(text) == 48 for text in ar)
    assert ("Started a local Ray instance" in log) == (executor == "ray")


@pytest.mark.parametrize("family", [pytest.param("sdar", marks=pytest.mark.long), "llada2"])
def test_families_with_two_workers(family: str) -> None:
    """One with dense layers and one with experts."""
    cases = cases_of(family, BLOCK_LENGTH)
    requests = []
    for prompt, params in map(family_request_of, cases):
        names = ("temperature", "max_tokens", "stop_token_ids", "ignore_eos", "extra_args")
        keys = {name: getattr(params, name) for name in names}
        requests.append(
            {"prompt": prompt["prompt_token_ids"], "params": keys | {"detokenize": False}}
        )
    tokens, _ = generate(
        ["mp", "dynamic", str(GOLDEN / family / "tiny_a"), f'{{"block_length": {BLOCK_LENGTH}}}'],
        requests,
    )
    assert tokens == [case["expected"] for case in cases]


@pytest.mark.long
def test_grammars_with_two_workers() -> None:
    """Each compiles for itself, all with the backend of the first request: xgrammar does not know
    `multipleOf`."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    schema = {"type": "integer", "multipleOf": 7, "minimum": 20, "maximum": 99}
    prompt = tokenizer.encode("<|user|>How many pens are left?<|assistant|>")
    requests = [
        {"constraint": {"json": schema}},
        *({"constraint": {"regex": "[A-Z][a-z]{4} [0-9]{2}"}} for _ in range(2)),
        {},
    ]
    for request, mode in zip(requests, ("diffusion", "diffusion", "verify", "ar"), strict=True):
        params = {"temperature": 0, "max_tokens": 40, "extra_args": {"nbdiff_mode": mode}}
        request |= {"prompt": prompt, "params": params}
    answers, _ = generate(["mp", "dynamic", str(NANO), "{}"], requests)
    number, *words, _ = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers)
    jsonschema.validate(json.loads(number), schema)
    assert all(re.fullmatch("[A-Z][a-z]{4} [0-9]{2}", word) for word in words)


@pytest.mark.long
def test_thoughts_with_two_workers() -> None:
    """Either sees where thinking ends, inside of blocks; of two prompts it has ended already."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    parser = {"reasoning_parser": "colon", "reasoning_parser_plugin": reasoning_parser.__file__}
    question = "<|user|>What is 12 + 30?<|assistant|>"
    requests, prompts = [], []
    for mode in ("diffusion", "verify", "ar"):
        for prompt in (question, question + "12 + 30" + reasoning_parser.END):
            params = {"temperature": 0, "max_tokens": 60, "extra_args": {"nbdiff_mode": mode}}
            constraint = {"regex": " ?[0-9]{2}!"}
            own = {"prompt": tokenizer.encode(prompt), "params": params, "constraint": constraint}
            requests.append(own)
            prompts.append(prompt)
    answers, _ = generate(["mp", "dynamic", str(NANO), "{}", json.dumps(parser)], requests)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    for prompt, text in zip(prompts, texts, strict=True):
        thought, answer = "", text
        if not prompt.endswith(reasoning_parser.END):
            thought, _, answer = text.partition(reasoning_parser.END)
        assert re.fullmatch(" ?[0-9]{2}!", answer) or (thought == text and len(text) > 20), texts
    assert texts[2:4] == texts[4:6]
    assert sum(text.endswith("!") for text in texts) >= 3
