# SPDX-License-Identifier: Apache-2.0
"""The command that times the kernels, on toy shapes, and the checks before its times."""

import sys

import pytest
from torch import Tensor

from benchmarks import kernel_cases
from benchmarks import kernels as command
from benchmarks.kernel_cases import TOY, attention_case, write_case

CONTENDERS = {
    "segment_attention": {
        "ours",
        "sdpa, KV gathered beforehand",
        "flex attention, KV gathered beforehand",
    },
    "write_kv": {"ours", "index_copy_"},
    "row_statistics": {"ours", "eager fp32"},
    "row_sample": {"ours", "ours, top-p 0.9", "eager fp32 multinomial"},
    "decisions": {"ours"},
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_toy_run_times_every_contender(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["kernels", "--toy", "--requests", "1", "--contexts", "19"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    lines = capsys.readouterr().out.splitlines()
    assert "times mean nothing" in lines[0]
    rows = [line.split("\t") for line in lines if not line.startswith("#")][1:]
    assert {k: {r[3] for r in rows if r[0] == k} for k in CONTENDERS} == CONTENDERS
    assert all(row[1:3] == ["1", "19" if row[0] == "segment_attention" else "0"] for row in rows)


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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_cases.segment_attention

    def wrong_scale(*args: Tensor, scale: float, **options: int) -> Tensor:
        return right(*args, scale=scale * 1.01, **options)

    monkeypatch.setattr(kernel_cases, "segment_attention", wrong_scale)
    with pytest.raises(AssertionError, match=r"^ours: error"):
        attention_case(TOY, 1, 19)
    monkeypatch.setattr(kernel_cases, "write_kv", lambda *args: None)
    with pytest.raises(AssertionError, match="write_kv differs"):
        write_case(TOY, 1)
