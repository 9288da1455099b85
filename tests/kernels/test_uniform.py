# SPDX-License-Identifier: Apache-2.0
"""The generator against its published algorithm."""

import pytest
import torch
from scipy.stats import kstest
from vllm_nbdiff.kernels.uniform import uniform

WORD = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The output after one step from `state`, in Python's unbounded integers (Steele et al.)."""
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def test_a_draw_is_a_chain_of_splitmix64() -> None:
    # The first output from state 0 as published (Vigna, splitmix64.c).
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    for keys in [(0, 0, 0), (-1, 5, 2), (-(2**63), 2**40, 31), (123456789, 77, 0)]:
        state = 0
        for key in keys:
            state = splitmix64((state + key) & WORD)
        expected = (state >> 11) / 2**53
        assert uniform(*(torch.tensor([key]) for key in keys)).item() == expected


@pytest.mark.parametrize("varied", [0, 1, 2])
def test_uniform_in_each_key(varied: int) -> None:
    """Consecutive values of one key, the others fixed: uniform, and all 53 bits are in use."""
    keys = [torch.full((100_000,), 3) for _ in range(3)]
    keys[varied] = torch.arange(100_000)
    draws = uniform(*keys)
    assert kstest(draws.numpy(), "uniform").pvalue > 1e-3
    assert draws.min() >= 0 and draws.max() < 1
    bits = (draws * 2.0**53).long()
    share = torch.stack([(bits >> bit & 1).double().mean() for bit in range(53)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / 100_000**0.5
