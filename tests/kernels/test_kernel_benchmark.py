# SPDX-License-Identifier: Apache-2.0
"""The command that times the kernels, on toy shapes, and the checks before its times."""

import sys

import pytest
import torch
from torch import Tensor

from benchmarks import attention_cases, kernel_cases
from benchmarks import kernels as command
from benchmarks.attention_cases import attention_case
from benchmarks.kernel_cases import TOY, Contender, write_case
from benchmarks.timing import seconds_on_cpu

CONTENDERS = {
    "segment_attention, one long": {"ours"},
    "segment_attention": {
        "ours",
        "sdpa, KV gathered beforehand",
        "flex attention, KV gathered beforehand",
    },
    "write_kv": {"ours", "index_put_"},
    "row_statistics": {"ours", "eager fp32"},
    "row_sample": {"ours", "ours, top-p 0.9", "eager fp32 multinomial"},
    "decisions": {"ours"},
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_toy_run_times_every_contender(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["kernels", "--toy", "--requests", "2", "--contexts", "64"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "times mean nothing" in lines[0]
    rows = [line.split("\t") for line in lines if not line.startswith("#")][1:]
    assert {k: {r[3] for r in rows if r[0] == k} for k in CONTENDERS} == CONTENDERS
    assert all(row[1:3] == ["2", "64" if "attention" in row[0] else "0"] for row in rows)


def test_what_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = []

    def fits(num_bytes: int, device: str) -> bool:
        wanted.append(num_bytes)
        return False

    monkeypatch.setattr(command, "fits", fits)
    monkeypatch.setattr(command, "other_cases", lambda shapes, count: [])
    assert list(command.cases(TOY, [3], [20])) == []
    assert "3 requests of 20 tokens" in capsys.readouterr().out
    assert wanted == [3 * 3 * (20 + 8) * 2 * 2 * 32 * 4]


def test_caches_are_laid_out_as_in_the_engine() -> None:
    keys, values = kernel_cases.paged_cache(TOY, 5)
    engine = torch.empty(5, TOY.kv_heads, TOY.page_size, 2 * TOY.head_dim)
    for ours, theirs in zip((keys, values), engine.split(TOY.head_dim, dim=-1), strict=True):
        layout = theirs.transpose(1, 2)
        assert (ours.shape, ours.stride()) == (layout.shape, layout.stride())
    assert values.data_ptr() - keys.data_ptr() == TOY.head_dim * TOY.dtype.itemsize
    assert len(keys.unique()) > keys.numel() // 2


def reported(case: kernel_cases.Case, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """Names of contenders that failed, and what was printed of it, the rest being timed."""
    failed = command.report(case, seconds_on_cpu, 1.0)
    lines = capsys.readouterr().out.splitlines()
    timed = {line.split("\t")[3] for line in lines if not line.startswith("#")}
    assert timed == set(case.contenders) - set(failed)
    return failed, "\n".join(line for line in lines if line.startswith("#"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_wrong_results_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention_cases.segment_attention

    def wrong_scale(*args: Tensor, scale: float, **options: int) -> Tensor:
        return right(*args, scale=scale * 1.01, **options)

    monkeypatch.setattr(attention_cases, "segment_attention", wrong_scale)
    failed, why = reported(attention_case(TOY, 1, 19), capsys)
    assert failed == ["ours"] and "AssertionError: error" in why
    monkeypatch.setattr(kernel_cases, "write_kv", lambda *args: None)
    failed, why = reported(write_case(TOY, 1), capsys)
    assert failed == ["ours"] and "other keys or values" in why


@pytest.mark.parametrize(("contender", "status"), [("eager", 0), ("ours, top-p 0.9", 1)])
def test_a_failure_is_reported_and_the_rest_go_on(
    contender: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise RuntimeError("out of\nregisters")

    names = ["eager", "ours", "ours, top-p 0.9"]
    runs = {name: Contender(fail if name == contender else lambda: None) for name in names}
    case = kernel_cases.Case("row_sample", 3, 0, 100, runs)
    monkeypatch.setattr(command, "cases", lambda *sizes: [case, case])
    monkeypatch.setattr(sys, "argv", ["kernels", "--toy"])
    assert command.main() == status
    out = capsys.readouterr().out
    label = "row_sample\t3\t0\t"
    assert out.count(f"# failed: {label}{contender}\tRuntimeError: out of registers") == 2
    assert out.count(f"\n{label}") == 4
