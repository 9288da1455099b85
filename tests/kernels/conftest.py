# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels on CPU in Triton's interpreter, on memory that is poisoned when allocated."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreter import interpret_kernels

interpret_kernels()

INTEGER_POISON = -1_000_003


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor if tensor.dtype == torch.bool else tensor.fill_(INTEGER_POISON)

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An element that no kernel wrote, or that one read before it was written, shows as NaN."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(42)
