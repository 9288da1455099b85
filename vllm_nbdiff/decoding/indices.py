# SPDX-License-Identifier: Apache-2.0
"""0, 1, 2 and so on, as tensors that are made once."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def indices(count: int, device: torch.device) -> Tensor:
    """[count] int64 on `device`, from 0; shared by all that ask, so never to be written.

    For the few counts of a server, such as columns and requests, which are kept for good.
    """
    return torch.arange(count, device=device)
