# SPDX-License-Identifier: Apache-2.0
"""Invariants of the forward process and of the block growth."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nbdiff.adapt.loss import LossOptions
from vllm_nbdiff.adapt.noise import noise_blocks
from vllm_nbdiff.adapt.schedule import BlockGrowth, Schedule

MASK = 99


@given(
    length=st.integers(1, 40),
    block_length=st.integers(1, 16),
    seed=st.integers(0, 10_000),
    bias=st.sampled_from([0.0, 8.0]),
    known=st.lists(st.integers(0, 40), min_size=3, max_size=3),
)
def test_only_mask_tokens_are_written_and_never_over_what_is_known(
    length: int, block_length: int, seed: int, bias: float, known: list[int]
) -> None:
    """Known are the seeds, and the beginning of each row."""
    generator = torch.Generator().manual_seed(seed)
    answer = torch.randint(0, MASK, (3, length), generator=generator)
    noised = noise_blocks(answer, block_length, MASK, generator, bias, torch.tensor(known))
    assert not any(noised.masked[row, :number].any() for row, number in enumerate(known))
    assert torch.equal(noised.ids == MASK, noised.masked)
    assert torch.equal(noised.ids[~noised.masked], answer[~noised.masked])
    assert not noised.masked[:, ::block_length].any()
    assert ((noised.level > 0) & (noised.level <= 1)).all()
    for start in range(0, length, block_length):
        block = noised.level[:, start : start + block_length]
        assert (block == block[:, :1]).all()


@pytest.mark.parametrize("bias", [0.0, 8.0])
def test_share_of_masks_follows_the_level(bias: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noised = noise_blocks(torch.zeros(4000, 32, dtype=torch.long), 32, MASK, generator, bias)
    level, share = noised.level[:, 0], noised.masked[:, 1:].float().mean(dim=1)
    assert abs(level.mean() - 0.5) < 0.02
    assert abs((level < 0.1).float().mean() - 0.1) < 0.02
    assert abs((share - level).mean()) < 0.01
    assert torch.corrcoef(torch.stack([share, level]))[0, 1] > 0.95


def test_a_share_of_blocks_is_masked_whole() -> None:
    """But for the seeds; the others are as without it."""
    answer = torch.zeros(4000, 16, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    noised = noise_blocks(answer, 16, MASK, generator, draft_share=0.3)
    whole = noised.level[:, 0] == 1
    assert abs(whole.float().mean() - 0.3) < 0.03  # four standard errors
    assert noised.masked[whole, 1:].all() and not noised.masked[:, 0].any()
    assert abs(noised.masked[~whole, 1:].float().mean() - 0.5) < 0.02


def test_first_tokens_of_a_share_of_the_drafts_are_masks_and_no_targets() -> None:
    """But for tokens that are known; everything else is as without it."""
    answer, known = torch.zeros(4000, 16, dtype=torch.long), torch.arange(4000) % 2
    shares = {"draft_share": 0.5, "fan_out_share": 0.4}
    noised = noise_blocks(answer, 16, MASK, torch.Generator().manual_seed(0), known=known, **shares)
    hidden, whole = noised.ids == MASK, noised.level[:, 0] == 1
    assert not noised.masked[:, 0].any() and torch.equal(hidden[:, 1:], noised.masked[:, 1:])
    assert not hidden[~whole, 0].any() and not hidden[known == 1, 0].any()
    assert abs(hidden[whole & (known == 0), 0].float().mean() - 0.4) < 0.06  # four standard errors
    assert noised.masked[whole, 1:].all()


def test_without_bias_every_position_is_masked_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    noised = noise_blocks(torch.zeros(20_000, 8, dtype=torch.long), 8, MASK, generator)
    share = noised.masked[:, 1:].float().mean(dim=0)
    assert (share - 0.5).abs().max() < 0.015  # four standard errors
    # Independent given the level: both of two positions with probability E[t^2] = 1/3.
    both = (noised.masked[:, 1] & noised.masked[:, 7]).float().mean()
    assert abs(both - 1 / 3) < 0.015


def test_bias_masks_later_positions_more_often() -> None:
    generator = torch.Generator().manual_seed(0)
    noised = noise_blocks(torch.zeros(8000, 16, dtype=torch.long), 16, MASK, generator, 8.0)
    for low, high in ((0.0, 1.0), (0.4, 0.6)):
        some = noised.masked[(noised.level[:, 0] > low) & (noised.level[:, 0] <= high)]
        share = some[:, 1:].float().mean(dim=0)
        assert (share.diff() > 0).all()
    weak = noised.masked[noised.level[:, 0] > 0.97][:, 1:].float().mean(dim=0)
    assert (weak.diff() < 0.05).all()  # nearly all masked: no room for a preference


def test_blocks_of_a_row_have_levels_of_their_own() -> None:
    noised = noise_blocks(torch.zeros(1, 64, dtype=torch.long), 8, MASK)
    assert noised.level[0, ::8].unique().numel() == 8


def test_growth_follows_the_formula() -> None:
    growth = BlockGrowth(interval=10, start=5, initial=1, ratio=2, final=32)
    steps = [0, 14, 15, 24, 25, 35, 45, 54, 55, 10_000_000]
    assert [growth(step) for step in steps] == [1, 1, 2, 2, 4, 8, 16, 16, 32, 32]
    assert BlockGrowth(interval=1, initial=3, ratio=3, final=32)(9) == 32


@given(step=st.integers(0, 5000), interval=st.integers(1, 300), final=st.integers(1, 64))
def test_growth_never_shrinks_nor_overshoots(step: int, interval: int, final: int) -> None:
    growth = BlockGrowth(interval=interval, final=final)
    assert 1 <= growth(step) <= growth(step + 1) <= final


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval"),
        ({"interval": 1, "ratio": 1}, "ratio"),
        ({"interval": 1, "initial": 0}, "initial"),
        ({"interval": 1, "initial": 64}, "initial"),
    ],
)
def test_growth_names_a_bad_value(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockGrowth(**options)


def test_certainty_loss_belongs_to_the_last_stage() -> None:
    schedule = Schedule(BlockGrowth(interval=10), certainty_from=100)
    options = LossOptions(certainty_weight=2.0)
    assert schedule.loss_options(99, options).certainty_weight == 0
    assert schedule.loss_options(100, options) == options
    assert schedule.block_length(50) == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ar_weight": -1}, "ar_weight"),
        ({"certainty_weight": -0.1}, "certainty_weight"),
        ({"weighting": "cosine"}, "weighting"),
        ({"draft_share": 1.5}, "draft_share"),
        ({"draft_share": 0.5, "fan_out_share": -1}, "fan_out_share"),
        ({"fan_out_share": 0.5}, "draft_share, which is 0"),
        ({"context": "block"}, "context must be"),
        ({"context": "block-causal"}, "seeds"),
        ({"context": "block-causal", "ar_targets": "seeds", "ar_weight": 0}, "ar_weight"),
    ],
)
def test_loss_options_name_a_bad_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossOptions(**options)
