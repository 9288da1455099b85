# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels on memory that is poisoned when allocated: on CPU in Triton's interpreter, or on
the device that NBDIFF_KERNELS_ON names.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreter import interpret_kernels

DEVICE = torch.device(os.environ.get("NBDIFF_KERNELS_ON", "cpu"))
collect_ignore: list[str] = []
if DEVICE.type == "cpu":
    interpret_kernels()
else:
    # About commands, which interpret the kernels.
    collect_ignore += ["test_kernel_benchmark.py", "test_step_benchmark.py", "test_tune.py"]

INTEGER_POISON = -1_000_003


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor if tensor.dtype == torch.bool else tensor.fill_(INTEGER_POISON)

    return allocate_poisoned


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with DEVICE:
        yield


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An element that no kernel wrote, or that one read before it was written, shows as NaN."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(42)
