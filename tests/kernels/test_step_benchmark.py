# SPDX-License-Identifier: Apache-2.0
"""The step that `benchmarks.step` times, against plain PyTorch, and its command on toy shapes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import step as command
from benchmarks.step_model import (
    MASK,
    NBDIFF_7B,
    TOY,
    Step,
    Weights,
    bytes_to_move,
    random_batch,
    random_weights,
)
from benchmarks.step_reference import check, reference_step


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(TOY)


@pytest.mark.parametrize(("requests", "context"), [(1, 0), (3, 45)])
def test_hidden_states_and_logits_are_those_of_dense_attention(
    weights: Weights, requests: int, context: int
) -> None:
    """Within twice the error of eager fp32; a second replay gives the same, bit for bit."""
    step = Step(TOY, weights, random_batch(TOY, requests, context))
    check(step)
    first, second = step(), step()
    assert torch.equal(first.logits, second.logits)


def test_the_best_token_of_the_active_sub_block_is_filled(weights: Weights) -> None:
    """At untrained probabilities below the threshold, one position per request: the likeliest."""
    batch = random_batch(TOY, 3, 20)
    result = Step(TOY, weights, batch)()
    _, logits = reference_step(TOY, weights, batch, torch.float64)
    p, token = logits.softmax(dim=-1).max(dim=-1)
    assert p.max() < 0.9
    best = p.view(3, -1).argmax(dim=-1)
    expected = batch.canvas.clone()
    expected[range(3), TOY.sub_block + best] = token.view(3, -1)[range(3), best]
    assert torch.equal(result.canvas, expected)
    assert (result.canvas == MASK).sum(dim=-1).tolist() == [3] * 3


def test_the_check_notices_kv_in_the_wrong_slots(weights: Weights) -> None:
    batch = random_batch(TOY, 2, 20)
    with pytest.raises(RuntimeError, match="hidden states"):
        check(Step(TOY, weights, batch._replace(slots=batch.slots.roll(1))))


def test_bytes_are_those_of_the_shapes(weights: Weights) -> None:
    """Toy by hand; NBDiff-7B reads 139264 bytes of KV per token of context."""
    per_layer = 48 * (64 + 2 * 32) + 128 + 64 * 48 + 48 + 48 * 160 + 80 * 48 + 2 * 48
    kv = 3 * (20 + 8) * 2 * 2 * (2 * 16)
    expected = 4 * (2 * per_layer + 48 + 211 * 48 + kv)
    assert bytes_to_move(TOY, weights, random_batch(TOY, 3, 20)) == expected
    assert NBDIFF_7B.kv_bytes_per_token == 139264


def test_command_on_toy_shapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--toy", "--layers", "1", "--requests", "2", "--contexts", "0", "17"]
    monkeypatch.setattr(sys, "argv", ["step", *arguments, "--save", "toy"])
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    # The real one imports vLLM, which takes a quarter of a minute.
    monkeypatch.setattr("benchmarks.report._provenance", lambda settings, module: settings)
    command.main()
    lines = capsys.readouterr().out.splitlines()
    table = [line.split("\t") for line in lines if not line.startswith("#")]
    assert "times mean nothing" in lines[0]
    assert [row[:2] for row in table[1:]] == [["2", "0"], ["2", "17"]]
    saved = json.loads((tmp_path / "toy.json").read_text())
    assert [row["context"] for row in saved["results"]] == [0, 17]
    assert saved["layers"] == "1"
