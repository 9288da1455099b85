# SPDX-License-Identifier: Apache-2.0
"""The command that measures launch shapes of attention, on toy shapes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor
from vllm_nbdiff.kernels.tuned_tiles import tuned_tiles

from benchmarks import tune
from tests.interpreter import recorded_launches


@pytest.mark.parametrize(("seconds", "block_n"), [(0.97, 32), (0.99, None)])
def test_the_command_writes_what_is_faster(
    seconds: float,
    block_n: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Of the present shape and two others, of which one does not fit."""
    table = tmp_path / "tiles.json"
    arguments = ["tune", "--toy", "--requests", "2", "--context", "20", "--table", str(table)]
    monkeypatch.setattr(sys, "argv", arguments)
    outcomes = iter([1.0, RuntimeError("out of resource"), seconds])

    def measure(run: Callable[[], Tensor]) -> float:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(tune, "measure_of", lambda device: measure)
    with recorded_launches() as launches:
        tune.main()
    assert len([name for name, *_ in launches if name == "_segment_attention_kernel"]) == 3
    out = capsys.readouterr().out
    assert "RuntimeError: out of resource" in out
    assert f"{int(block_n is not None)} of 1 written" in out
    tiles = tuned_tiles("cpu", table) if table.exists() else {}
    assert [tile.block_n for tile in tiles.values()] == ([] if block_n is None else [block_n])


def test_toy_times_are_not_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", "--toy"])
    with pytest.raises(SystemExit):
        tune.main()
