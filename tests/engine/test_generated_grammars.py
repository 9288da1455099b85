# SPDX-License-Identifier: Apache-2.0
"""300 generated schemas, expressions and choices: every finished text meets its own."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from tests.conftest import tokens_of
from tests.engine.grammar_cases import is_valid, random_constraint
from tests.engine.structured import (
    DIFFUSION,
    LOSSLESS,
    MASK,
    NANO,
    PROMPTS,
    generate,
    params,
    settings,
)

CONSTRAINTS = [random_constraint(Random(seed)) for seed in range(1000, 1300)]
MODES = [*DIFFUSION, *LOSSLESS]  # 11, so that each meets each way to sample
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}]
TOGETHER = 16  # beside two without a constraint
FINISHED = {"bundled": 0.9, "random": 0.5}
"""Least share of texts that end by themselves; what random weights write is long."""

Request = tuple[str, Any]


@pytest.fixture(scope="module", params=FINISHED)
def engine(
    request: Any, make_llm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any]]:
    checkpoint = NANO
    if request.param == "random":
        checkpoint = with_random_weights(tmp_path_factory.mktemp("random"))
    more = {"max_num_seqs": TOGETHER + 2}
    yield request.param, make_llm(checkpoint, block_length=32, mask=MASK, **settings(**more))


def with_random_weights(folder: Path) -> Path:
    """The bundled checkpoint with other weights."""
    shutil.copytree(NANO, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(NANO))
    model.save_pretrained(folder)
    shutil.copy(NANO / "config.json", folder)
    return folder


def requests_of(modes: list[dict[str, Any]], sampling: list[dict[str, Any]]) -> list[Request]:
    """One for each constraint; modes and ways to sample take turns."""
    return [
        (
            PROMPTS[i % len(PROMPTS)],
            params(
                constraint,
                max_tokens=120,
                extra_args=modes[i % len(modes)],
                **sampling[i % len(sampling)],
            ),
        )
        for i, constraint in enumerate(CONSTRAINTS)
    ]


def run(llm: Any, requests: list[Request]) -> list[Any]:
    """Their outputs, and that plain requests between them give what they give alone."""
    plain = [(PROMPTS[i], params(None, extra_args=extra)) for i, extra in enumerate(DIFFUSION[:2])]
    alone = tokens_of(generate(llm, plain))
    mixed = []
    for start in range(0, len(requests), TOGETHER):
        mixed += requests[start : start + TOGETHER] + plain
    outputs = generate(llm, mixed)
    own = [output for output, (_, asked) in zip(outputs, mixed, strict=True) if wants(asked)]
    others = [output for output, (_, asked) in zip(outputs, mixed, strict=True) if not wants(asked)]
    assert tokens_of(others) == alone * (len(others) // len(alone))
    return own


def wants(asked: Any) -> bool:
    return asked.structured_outputs is not None


def assert_legal(outputs: list[Any], least: float) -> None:
    ends = [output.outputs[0] for output in outputs]
    assert {end.finish_reason for end in ends} <= {"stop", "length"}
    finished = [
        (constraint, end.text)
        for constraint, end in zip(CONSTRAINTS, ends, strict=True)
        if end.finish_reason == "stop"
    ]
    assert [pair for pair in finished if not is_valid(*pair)] == []
    assert len(finished) > least * len(ends)


def test_every_text_is_legal(engine: tuple[str, Any]) -> None:
    name, llm = engine
    assert_legal(run(llm, requests_of(MODES, SAMPLING)), FINISHED[name])


@pytest.mark.long
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_every_text_is_legal_in_every_mode(
    engine: tuple[str, Any], sampling: dict[str, Any]
) -> None:
    """And greedy text of the lossless modes is the same."""
    name, llm = engine
    exact = None
    for mode in MODES:
        outputs = run(llm, requests_of([mode], [sampling]))
        assert_legal(outputs, FINISHED[name])
        if mode.get("nbdiff_mode", "diffusion") != "diffusion" and not sampling:
            exact = exact or tokens_of(outputs)
            assert tokens_of(outputs) == exact
