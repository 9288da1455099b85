# SPDX-License-Identifier: Apache-2.0
"""The pure parts of the benchmark; no engine is started."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import __main__ as command
from benchmarks import budget, rows
from benchmarks.budget import Budget
from benchmarks.canvases import Canvases
from benchmarks.engines import AR, DIFFUSION, OURS, STOCK, Sample
from benchmarks.forward_timer import Clock, ForwardTimer
from benchmarks.nano import CHECKPOINT, SCHEMA, NanoJson
from benchmarks.random_model import StepMix, find_chance, find_step_mix
from benchmarks.report import make_row
from vllm_nbdiff.decoding.decide import read_text
from vllm_nbdiff.decoding.plan import make_plan
from vllm_nbdiff.decoding.rows import pack
from vllm_nbdiff.decoding.sampling import Drawn


def tokens_per_forward(steps: int) -> float:
    return 32 / (steps + 1)


@pytest.mark.parametrize("tpf", [1.0, 1.7, 4.0, 4.3, 5.13, 8.0, 15.9, 16.0])
def test_mix_reaches_the_average(tpf: float) -> None:
    mix = find_step_mix(tpf, tokens_per_forward)
    forwards = [mix.of_request(index) + 1 for index in range(1000)]
    assert 32 * len(forwards) / sum(forwards) == pytest.approx(tpf, rel=2e-3)
    assert max(forwards) - min(forwards) <= 1


def test_mix_is_found_from_a_bad_estimate() -> None:
    """An engine that needs fewer forwards than steps + 1 is met by more steps, and conversely."""
    for free in (0.9, -0.9):
        mix = find_step_mix(4.0, lambda steps, free=free: 32 / (steps + 1 - free))  # type: ignore[misc]
        forwards = [mix.of_request(index) + 1 - free for index in range(1000)]
        assert 32 * len(forwards) / sum(forwards) == pytest.approx(4.0, rel=2e-3)


def test_mix_of_what_cannot_be_reached_is_the_closest() -> None:
    assert find_step_mix(20.0, tokens_per_forward) == StepMix(1, 0.0)
    assert find_step_mix(0.5, tokens_per_forward) == StepMix(32, 0.0)


def test_shares_hold_for_few_requests() -> None:
    mix = StepMix(steps=7, fewer=0.5)
    assert sorted(mix.of_request(index) for index in range(4)) == [6, 6, 7, 7]


def test_row_takes_medians_and_totals() -> None:
    def sample(tokens: int, seconds: float, forwards: int, exact: int) -> Sample:
        return Sample(tokens, seconds, forwards, seconds / 2, exact, problems=4)

    samples = {
        "ar": [sample(100, 2.0, 100, 4), sample(100, 1.0, 100, 3), sample(100, 10.0, 100, 4)],
        "diffusion": [sample(100, 1.0, 20, 4), sample(120, 0.5, 30, 4), sample(80, 8.0, 10, 2)],
    }
    row = make_row("nano", "diffusion", 4, samples)
    assert (row.tokens_per_s, row.ratio_to_ar) == (100.0, 2.0)
    assert (row.exact, row.tpf, row.step_over_bare) == (83.3, 5.0, 2.0)
    assert row.rounds == 3
    assert make_row("nano", "ar", 4, samples).ratio_to_ar == 1.0


def test_nothing_to_check_is_no_score() -> None:
    samples = {mode: [Sample(10, 1.0, 5, 0.5, 0, 0)] for mode in ("ar", "diffusion")}
    assert make_row("125m", "ar", 1, samples).exact is None


def test_clock_counts_calls_that_raise_too() -> None:
    clock = Clock()
    with pytest.raises(ZeroDivisionError):
        clock.timed(lambda: 1 / 0)()
    assert clock.timed(lambda: 5)() == 5
    assert clock.calls == 2 and clock.seconds > 0


def test_clock_costs_little() -> None:
    """Less than 1 % of the shortest forward met, 0.5 ms."""
    clock, calls = Clock(), 2000
    timed = clock.timed(lambda: None)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            timed()
        best = min(best, time.perf_counter() - start)
    assert best / calls < 5e-6


def test_time_that_a_part_leaves_goes_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(budget, "perf_counter", lambda: now[0])
    shared = Budget(100, 4)
    shared.begin_part()
    assert shared.has(25) and not shared.has(25.1)
    now[0] = 10.0
    shared.begin_part()
    assert shared.has(30) and not shared.has(30.1)
    now[0] = 80.0  # beyond its share
    shared.begin_part()
    assert shared.has(10) and not shared.has(10.1)
    now[0] = 120.0
    shared.begin_part()
    assert not shared.has(0)


class FakeEngine:
    """Notes what is alive; a round takes a second a request in flight, on a clock of its own."""

    alive: ClassVar[list[str]] = []
    now = 0.0

    def __init__(self, architecture: str, model: Path, dtype: str) -> None:
        self.name, self.stock = architecture, architecture == STOCK
        self.alive.append(architecture)
        self.llm = SimpleNamespace(collective_rpc=self.call)

    def call(self, name: str, args: tuple[int]) -> list[Any]:
        assert self.alive == [self.name]
        return [1.0 if name == "time_rows" else (1.0, 1.0)]

    def run(self, requests: list[int], batch: int) -> Sample:
        FakeEngine.now += batch
        return Sample(10, 1.0, 5, 0.5, 0, 0)

    def close(self) -> None:
        self.alive.remove(self.name)


@pytest.fixture
def fake_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "alive", [])
    monkeypatch.setattr(FakeEngine, "now", 0.0)
    for module in (command, rows):
        monkeypatch.setattr(module, "Engine", FakeEngine)
    for module in (command, budget):
        monkeypatch.setattr(module, "perf_counter", lambda: FakeEngine.now)
    monkeypatch.setattr(command, "SETTLE_SECONDS", 0)


def make_run(**options: Any) -> command.Run:
    settings = {"models": ["nano"], "modes": [AR, DIFFUSION], "rounds": 3, "minutes": 1} | options
    console = Console(quiet=True)
    return command.Run(Namespace(**settings), console, Progress(console=console))


def test_a_long_round_leaves_the_others_fewer(fake_engines: None) -> None:
    """Of 400 s, 64 requests take 128 to warm up and 128 a round; 16 then have 72, 1 the rest."""
    run = make_run(batches=[1, 16, 64], minutes=400 / 60)
    workload: Any = SimpleNamespace(name="nano", requests=lambda mode, batch, index: [0])
    with run.engines(Path(), "float32") as engines:
        run.measure(workload, engines)
    assert [(row.batch, row.rounds) for row in run.rows[::2]] == [(64, 1), (16, 1), (1, 3)]


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_engines_of_a_model_end_with_it(fake_engines: None, error: type[Exception] | None) -> None:
    ends = nullcontext() if error is None else pytest.raises(error)
    with ends, make_run(batches=[1]).engines(Path(), "float32") as engines:
        assert FakeEngine.alive == [OURS, STOCK]
        assert engines[AR].stock and not engines[DIFFUSION].stock
        if error is not None:
            raise error
    assert FakeEngine.alive == []


def test_rows_of_one_engine_at_a_time(
    fake_engines: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None is left for the interpreter, which would wait for its process."""
    monkeypatch.setattr(rows, "build", lambda folder: None)
    monkeypatch.setattr(sys, "argv", ["rows"])
    rows.main()
    assert FakeEngine.alive == []
    assert len(capsys.readouterr().out.splitlines()) == 2 * (len(rows.ROWS) + 1)


@pytest.mark.parametrize("tokens", [1.0, 4.0, 8.0])
def test_forced_drafts_give_the_tokens_asked_for(tokens: float) -> None:
    """Drafts of 8 tokens, of which verification accepts so many on average."""
    length, vocab_size, mask = 8, 50, 2
    drafts = torch.randint(3, vocab_size, (4000, length)) % (vocab_size - 1)
    canvases = Canvases(drafts, 10, length, vocab_size, mask)
    options = canvases.options._replace(verifies=torch.ones(len(drafts), dtype=torch.bool))
    facts = canvases.facts._replace(verifies=True)
    state = canvases.table.read(canvases.slot)
    plan = make_plan(canvases.table, state, options, canvases.batch, facts)
    packed = pack(plan.rows, facts)
    nothing = torch.zeros(len(packed.owner))
    drawn = Drawn(nothing.long(), nothing, nothing)

    sampler = SimpleNamespace(draw=lambda *args: drawn)
    timer = ForwardTimer()
    decoder = SimpleNamespace(sampler=sampler)
    loop = SimpleNamespace(decoder=decoder)
    timer.model_runner = SimpleNamespace(model_state=SimpleNamespace(loop=loop))
    timer.force_acceptance(find_chance(tokens, length))
    forced = sampler.draw(None, plan, packed, None)
    assert not (forced.token == mask).any()

    following = packed.spread(forced.token, *plan.rows.needed.shape)[:, : plan.num_next]
    text = read_text(canvases.table, plan, canvases.batch, facts, following)
    assert text.length.double().mean() == pytest.approx(tokens, rel=0.03)


def test_json_requests_bring_the_schema_beside_the_modes_options() -> None:
    request = NanoJson(CHECKPOINT, 2).requests("verify", 1, 1)[0]
    assert request.params.structured_outputs.json == SCHEMA
    assert request.params.extra_args == {"nbdiff_mode": "verify"}
    assert request.problem is None, "no answer of that form is right"
