# SPDX-License-Identifier: Apache-2.0
"""What the forwards of one schedule gave the requests."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_nbdiff.decoding.indices import indices


class Emitted:
    """Tokens of B requests so far, at most E each."""

    def __init__(self, num_reqs: int, most: int, device: torch.device) -> None:
        self._tokens = torch.zeros((num_reqs, most + 1), dtype=torch.int64, device=device)
        self.count = torch.zeros(num_reqs, dtype=torch.int64, device=device)
        """[B] int64, tokens emitted."""
        self.ended = torch.zeros(num_reqs, dtype=torch.bool, device=device)
        """[B] bool, the last one ends the request."""

    @property
    def tokens(self) -> Tensor:
        """[B, E] int64, the emitted ones first."""
        return self._tokens[:, :-1]

    def end(self, requests: Tensor, count: Tensor) -> None:
        """End `requests` [B] bool behind their first `count` [B] tokens, of those emitted."""
        self.count = torch.where(requests, count, self.count)
        self.ended = self.ended | requests

    def append(self, tokens: Tensor, count: Tensor) -> None:
        """Emit the first `count` [B] of `tokens` [B, n] int64."""
        places = indices(tokens.shape[1], tokens.device)
        # The last column takes what is not emitted.
        target = torch.where(
            places < count[:, None], self.count[:, None] + places, self._tokens.shape[1] - 1
        )
        self._tokens.scatter_(1, target, tokens)
        self.count = self.count + count
