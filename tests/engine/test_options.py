# SPDX-License-Identifier: Apache-2.0
"""Options of a batch are read once until they change, on a device of their own or the host's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.conftest import options
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.decoding.rules import CONFIDENCE, ENTROPY
from vllm_nbdiff.engine.options import OptionTable
from vllm_nbdiff.engine_options import EngineOptions
from vllm_nbdiff.request_options import RequestOptions

CPU = torch.device("cpu")


@pytest.fixture(params=["shared", "copied"])
def table(request: pytest.FixtureRequest) -> OptionTable:
    """Of three slots; `copied`: as on a GPU, which has a copy of what the host has."""
    config = BlockDiffusionConfig(
        model_type="llama",
        block_length=32,
        mask_token_id=63,
        vocab_size=64,
        tensor_parallel_size=1,
        defaults=RequestOptions(block_length=32).resolved(),
        engine=EngineOptions(),
    )
    table = OptionTable(config, 3, 256, 512, 0, CPU)
    if request.param == "copied":
        table._shared, table._device = False, [rows.clone() for rows in table._device]
    for slot in range(3):
        add(table, slot, 10 + slot)
    table.upload()
    return table


def add(table: OptionTable, slot: int, max_tokens: int) -> None:
    extra = options(mode="auto")
    table.add_request(slot, SamplingParams(max_tokens=max_tokens, extra_args=extra), 5, False)


def read(table: OptionTable, *slots: int) -> tuple[list[int], list[int], list[float]]:
    """Last positions, block lengths and least chances."""
    own = table.read(np.array(slots), torch.tensor(slots))
    return own.last_position.tolist(), own.block_length.tolist(), own.least_chance.tolist()


def test_a_batch_is_read_once(table: OptionTable) -> None:
    slots, slot = np.array([2, 0]), torch.tensor([2, 0])
    assert table.read(slots, slot) is table.read(slots, slot)
    assert read(table, 2, 0)[0] == [16, 14]
    assert read(table, 0, 2)[0] == [14, 16]
    assert read(table, 1)[0] == [15]


def test_what_changes_is_read_anew(table: OptionTable) -> None:
    """A slot that another request has now, and what `auto` chooses; on a device as soon as it is
    brought there, however often it was read before."""
    lengths = read(table, 0, 1)[1]
    add(table, 1, 77)
    if not table._shared:
        assert read(table, 0, 1)[0] == [14, 15]
    table.upload()
    assert read(table, 0, 1)[0] == [14, 81]
    table.set_draft_length(np.array([0]), 8)
    table.upload()
    assert read(table, 0, 1)[1] == [8, lengths[1]]
    table.set_limits(np.array([1]), 0.25, 0.5)
    if not table._shared:
        assert read(table, 0, 1)[2] == [0, 0]
    table.upload()
    assert read(table, 0, 1)[2] == [0, 0.25]


def test_break_points_are_ranked_by_probability(table: OptionTable) -> None:
    """Whatever the server's algorithm is; drafts of several steps follow it."""
    entropy = replace(table.config.defaults, algorithm="entropy")
    table.config = replace(table.config, defaults=entropy)
    modes = [options(mode="verify", fan_out=2), options(mode="verify", draft_steps=2), options()]
    for slot, extra in enumerate(modes):
        table.add_request(slot, SamplingParams(extra_args=extra, max_tokens=9), 5, False)
    assert table.host["score"][:3].tolist() == [CONFIDENCE, ENTROPY, ENTROPY]
