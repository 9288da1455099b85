# SPDX-License-Identifier: Apache-2.0
"""The layers of a batch pass arguments of one layout: the first of them has it checked for all."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from vllm_nbdiff.kernels import segment_attention as attention
from vllm_nbdiff.kernels import write_kv as writing
from vllm_nbdiff.kernels.validation import MOST_LAYOUTS, once_per_layout, require

from tests.kernels.attention_cases import Case, Segment, make_case


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launchers' modules, one for each check from here on; nothing was checked before."""
    found: list[str] = []

    def count(module: ModuleType) -> None:
        check: Callable[..., None] = module._check_layout.__wrapped__

        def counted(*arguments: object) -> None:
            found.append(module.__name__.rpartition(".")[2])
            check(*arguments)

        monkeypatch.setattr(module, "_check_layout", once_per_layout(counted))

    count(attention)
    count(writing)
    return found


def layer(case: Case, rows: int) -> None:
    """One with a cache of its own, over the segments of the batch."""
    k_cache, v_cache = torch.stack([case.k_cache, case.v_cache], dim=1).unbind(1)
    key, value = torch.randn(rows, 4, 32).split(2, dim=1)
    writing.write_kv(key, value, k_cache, v_cache, torch.arange(rows), check_values=True)
    q = torch.randn_like(case.q)
    attention.segment_attention(
        q, k_cache, v_cache, case.segments, scale=case.scale, check_values=True
    )


def test_the_first_layer_of_a_batch_is_checked(checks: list[str]) -> None:
    both = ["write_kv", "segment_attention"]
    batch = make_case([Segment(4, 20, 1), Segment(4, 30, 0)])
    for _ in range(3):
        layer(batch, rows=8)
        assert checks == both
    larger = make_case([Segment(4, 20, 1), Segment(5, 30, 0)])
    for _ in range(2):
        layer(larger, rows=9)
        assert checks == 2 * both


def other_layouts(tensor: Tensor) -> dict[str, Tensor]:
    return {
        "dtype": tensor.view(torch.int32),
        "shape": tensor[..., :-1],
        "dimensions": tensor[None],
        "strides": tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
        "device": tensor.to("meta"),
    }


@pytest.mark.parametrize("argument", ["q", "k_cache", "v_cache"])
@pytest.mark.parametrize("what", ["dtype", "shape", "dimensions", "strides", "device"])
def test_a_later_layer_may_not_differ(checks: list[str], argument: str, what: str) -> None:
    """Nor may it when it tries again."""
    case = make_case([Segment(4, 20, 1), Segment(4, 30, 0)])
    attention.segment_attention(*case, scale=case.scale)
    wrong = case._replace(**{argument: other_layouts(getattr(case, argument))[what]})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^(q|k_cache|v_cache): "):
            attention.segment_attention(*wrong, scale=case.scale)
    assert len(checks) == 3


def test_values_are_checked_in_every_layer(checks: list[str]) -> None:
    case = make_case([Segment(4, 20, 1)])
    layer(case, rows=4)
    case.segments.page_table.fill_(99)
    with pytest.raises(ValueError, match=r"^page_table: "):
        layer(case, rows=4)
    key, slots = torch.randn(4, 2, 32), torch.full((4,), -2)
    with pytest.raises(ValueError, match=r"^slot_mapping: "):
        writing.write_kv(key, key, case.k_cache, case.v_cache, slots, check_values=True)


def test_nested_tensors_are_part_of_the_layout() -> None:
    found = []
    check = once_per_layout(lambda pair, scale: found.append((len(pair[1]), scale)))
    for length, scale in [(3, 1.0), (4, 1.0), (3, 1.0), (3, 2.0)]:
        check((torch.zeros(2), torch.zeros(length)), scale)
    check((torch.zeros(2), torch.zeros(4).double()), 1.0)
    assert found == [(3, 1.0), (4, 1.0), (3, 2.0), (4, 1.0)]


def test_memory_is_bounded() -> None:
    """A server that meets ever new batches forgets the first ones, and checks them again."""
    found = []

    def check(size: int) -> None:
        require(size >= 0, "size", "below 0")
        found.append(size)

    remembering = once_per_layout(check)
    for size in (*range(MOST_LAYOUTS + 1), 0, MOST_LAYOUTS):
        remembering(size)
    assert found == [*range(MOST_LAYOUTS + 1), 0]
