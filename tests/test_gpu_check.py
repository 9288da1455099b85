# SPDX-License-Identifier: Apache-2.0
"""The command that checks a GPU, rehearsed on a CPU; its stages fail one by one."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.gpu_check import __main__ as command
from scripts.gpu_check import engines, stages
from scripts.gpu_check.cases import LENGTHS, MAX_TOKENS, MODES, bundled_cases
from scripts.gpu_check.options import Options
from scripts.gpu_check.result import Result
from scripts.gpu_check.stages import STAGES, Stage
from tests.conftest import in_process


@pytest.mark.parametrize(
    "engine", [[], pytest.param(["eager"], marks=pytest.mark.long)], ids=["kernels", "engine"]
)
def test_a_rehearsal(engine: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Kernels, and an engine, in the interpreter; what needs a GPU is skipped with its reason."""
    out = tmp_path / "found.json"
    skipped = ["compiled", "full-graphs", "default", "monitored", "memory", "model"]
    chosen = ["kernels", *engine, *skipped]
    assert command.main(["--toy", "--only", *chosen, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {name: result["status"] for name, result in found.items()} == {
        name: "skipped" if name in skipped else "ok" for name in chosen
    }
    if engine:
        assert found["eager"]["detail"] == "3 requests, 3 modes: all tokens as stored"
        assert_steps(found["eager"]["figures"])
    assert all(found[name]["detail"] and found[name]["figures"]["seconds"] for name in chosen)
    table = capfd.readouterr().out.rpartition("stage ")[2]
    assert [line.split()[0] for line in table.splitlines()[1:]] == chosen


def assert_steps(figures: dict[str, Any]) -> None:
    """All requests took more than those that were alone."""
    steps = figures["steps"]
    assert steps["all"]["none"] > steps["alone"]["none"] > 0


def test_tokens_are_compared_with_the_stored_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine that interprets nothing; one other token is named."""
    options = Options(toy=False, model=None)
    settings = {"additional_config": {"nbdiff": {"static_shapes": True}}}
    with in_process():
        llm = engines.bundled(
            options, enforce_eager=True, kv_cache_memory_bytes=1 << 27, **settings
        )
    found = engines.compare(llm, options)
    cases = bundled_cases()
    right = f"{len(cases)} requests, {len(MODES)} modes: all tokens as stored"
    assert (found.status, found.detail) == ("ok", right)
    assert_steps(found.figures)
    other = replace(cases[0], tokens=(*cases[0].tokens[:-1], cases[0].tokens[-1] ^ 1))
    monkeypatch.setattr(engines, "bundled_cases", lambda: [other])
    found = engines.compare(llm, options)
    assert found.status == "wrong" and other.name in found.detail


@pytest.mark.long
def test_a_rehearsal_of_the_longer_stages(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    chosen = ["environment", "benchmark", "model"]
    model = str(command.ROOT / "examples" / "nbdiff-nano")
    arguments = ["--toy", "--model", model, "--only", *chosen, "--out", str(out)]
    assert command.main(arguments) == 0
    found = json.loads(out.read_text())
    assert [found[name]["status"] for name in chosen] == ["ok"] * 3
    assert "in 2 of 2" in found["model"]["detail"]


def test_wrong_results_and_failures_end_in_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the stages after them run."""
    results = iter(
        [Result("wrong", "another token"), Result("failed", "exit status 1"), Result("ok")]
    )
    monkeypatch.setattr(command, "run_apart", lambda name, options: next(results))
    out = tmp_path / "found.json"
    chosen = ["eager", "default", "memory"]
    assert command.main(["--only", *chosen, "--out", str(out)]) == 1
    assert [r["status"] for r in json.loads(out.read_text()).values()] == ["wrong", "failed", "ok"]
    assert "another token" in capsys.readouterr().out


def test_a_stage_that_breaks_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends, and with it all that it has started."""
    options = Options(toy=True, model=None)
    monkeypatch.setitem(STAGES, "kernels", Stage(STAGES["kernels"].run, limit_s=0.2))
    began = time.monotonic()
    hung = command.run_apart("kernels", options)
    assert hung.status == "failed" and "longer than 0.2 s" in hung.detail
    assert time.monotonic() - began < 30
    broken = {"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"}
    monkeypatch.setitem(STAGES, "eager", Stage(STAGES["eager"].run, 60, broken))
    failed = command.run_apart("eager", options)
    assert failed.status == "failed" and failed.detail == "exit status 1"


@pytest.mark.parametrize(("spills", "status"), [("0", "ok"), ("16", "wrong")])
def test_kernels_are_compiled_for_the_gpu_that_is_there(
    monkeypatch: pytest.MonkeyPatch, spills: str, status: str
) -> None:
    found = []

    def command(*arguments: str) -> tuple[int, str]:
        found.append(arguments[arguments.index("--targets") + 1])
        row = ("sm_80", "bf16 4x128", "_write_kv_kernel", "28", spills, "0", "-", "16")
        return 0, "target\tcase\n" + "\t".join(row) + "\n"

    monkeypatch.setattr(stages, "command", command)
    for capability in [(8, 0), (10, 0)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda own=capability: own)
        result = STAGES["compiled"].run(Options(toy=False, model=None))
        assert result.status == status
        assert result.detail.startswith("1 launches")
        assert ("_write_kv_kernel" in result.detail) == (status == "wrong")
    assert found == ["80", "100"]


@pytest.mark.parametrize(
    ("alone", "steps", "status"),
    [
        ({"full": 9}, {"full": 15, "piecewise": 5}, "ok"),
        ({"full": 8, "none": 1}, {"full": 15, "none": 5}, "wrong"),
        ({}, {}, "wrong"),
    ],
)
def test_requests_that_are_alone_run_in_full_graphs(
    alone: dict[str, float], steps: dict[str, float], status: str
) -> None:
    found = Result("ok", "tokens", {"steps": {"alone": alone, "all": steps}})
    judged = engines.judge_graphs(found)
    assert judged.status == status
    assert ("75% of 20 steps" in judged.detail) == bool(steps)
    assert ("1 of requests that were alone" in judged.detail) == ("none" in alone)


def test_memory_stays_within_what_vllm_was_given() -> None:
    gib = 1 << 30
    assert engines.judge_memory(3 * gib, 4 * gib, 8 * gib).status == "ok"
    more = engines.judge_memory(3 * gib, 4 * gib + 1, 8 * gib)
    assert more.status == "wrong" and "1024 MiB more" in more.detail


def test_stored_tokens_are_of_every_mode_and_length() -> None:
    cases = bundled_cases()
    assert {(case.mode, len(case.prompt)) for case in cases} == {
        (mode, length) for mode in MODES for length in LENGTHS
    }
    free = [case for case in cases if "ignore_eos" not in case.sampling]
    assert all(len(case.tokens) == MAX_TOKENS for case in free)
    # What may end a text does.
    assert any(len(case.tokens) < MAX_TOKENS for case in cases if case not in free)
    # What decodes losslessly has the text of `ar`.
    texts = {(case.mode, case.prompt): case.tokens for case in cases}
    for (mode, prompt), tokens in texts.items():
        if mode in ("verify", "auto"):
            assert tokens == texts["ar", prompt]
