# SPDX-License-Identifier: Apache-2.0
"""What tensor-parallel workers have to agree on: they must run the same forwards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Agree = Callable[[np.ndarray], np.ndarray]
"""From what a rank would choose to what all ranks take."""


def alone(values: np.ndarray) -> np.ndarray:
    """Of a worker that has no others to agree with."""
    return values


def of_first_rank(values: np.ndarray) -> np.ndarray:
    """The first rank's `values`; every rank has to ask, with as many of the same type.

    By way of the host: nothing on a device waits.
    """
    from vllm.distributed import get_tp_group

    group, shared = get_tp_group(), torch.from_numpy(values.copy())
    torch.distributed.broadcast(shared, src=group.first_rank, group=group.cpu_group)
    return shared.numpy()
