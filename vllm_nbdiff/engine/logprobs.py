# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of tokens, from the forward that decides them to the one that emits them.

A token of a canvas is scored in the denoise step that fills it, one that is verified, and the seed
of a block, by the causal row before it. What a later forward decides anew it scores anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors

from vllm_nbdiff.decoding.logprobs import score
from vllm_nbdiff.decoding.needed import predicted
from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.rows import Packed
from vllm_nbdiff.engine.schedule import Schedule

_CHUNK = 1 << 24  # logits that are scored together


class LogprobTable:
    """Scores of the tokens that requests have decided and not yet emitted, by slot and position.

    A request has room for the positions of four blocks; the place of a position is its remainder.
    """

    def __init__(
        self, num_slots: int, length: int, vocab_size: int, mode: str, device: torch.device
    ) -> None:
        """
        Args:
            num_slots: largest number of requests.
            length: the served block length.
            vocab_size: of the model.
            mode: vLLM's `logprobs_mode`.
            device: of the model.
        """
        self.processed = mode.startswith("processed")
        self._normalized = mode.endswith("logprobs")
        self._shape = (num_slots + 1, 4 * length)  # a spare slot takes what is not used
        self._chunk = max(_CHUNK // vocab_size, 1)
        self._vocab_size = vocab_size
        self._device = device
        self._wanted = np.full(num_slots + 1, -1, np.int64)
        """[slots + 1]: likeliest tokens that a request wants beside the chosen one; -1: nothing."""
        self._asking = np.zeros(0, np.int64)
        self._names = np.zeros(num_slots + 1, np.bool_)
        self._named = torch.full((num_slots + 1, MAX_LOGPROB_TOKEN_IDS), -1, device=device)
        """Tokens that a request names in place of the likeliest ones; -1: none."""
        self._rank = torch.zeros(self._shape, dtype=torch.int32, device=device)
        self._token, self._value = self._of_width(1)

    def add_request(self, slot: int, num_logprobs: int | None, named: Sequence[int] = ()) -> None:
        """Set how many tokens a request wants, the likeliest or those that it has `named`; None: no
        log-probabilities."""
        if named or self._names[slot]:
            row = [*named, *([-1] * (MAX_LOGPROB_TOKEN_IDS - len(named)))]
            self._named[slot] = async_tensor_h2d(row, dtype=torch.int64, device=self._device)
        self._names[slot] = bool(named)
        alone = not (self._wanted >= 0).any()
        self._wanted[slot] = -1 if num_logprobs is None else num_logprobs
        # What the widest request took is given back when another one finds itself alone.
        width = self._token.shape[2]
        if num_logprobs is not None and (alone or num_logprobs >= width):
            token, value = self._of_width(num_logprobs + 1)
            if not alone:
                token[..., :width], value[..., :width] = self._token, self._value
            self._token, self._value = token, value

    def remove_request(self, slot: int) -> None:
        """Forget a finished or preempted request."""
        self._wanted[slot] = -1

    def _of_width(self, width: int) -> tuple[Tensor, Tensor]:
        """Room for `width` tokens at every place, and for their scores."""
        token = torch.zeros((*self._shape, width), dtype=torch.int32, device=self._device)
        return token, torch.zeros((*self._shape, width), device=self._device)

    @property
    def asked(self) -> bool:
        """Whether a request of the schedule wants any."""
        return len(self._asking) > 0

    def begin(self, schedule: Schedule, first: Callable[[], Tensor]) -> None:
        """Take the batch of a schedule; `first` gives the positions [B] int64 of the first tokens
        that it may emit, for which nothing is computed unless some request asks."""
        wanted = self._wanted[schedule.slots]
        self._asking = np.flatnonzero(wanted >= 0)
        if self.asked:
            self._schedule, self._first = schedule, first()
            self._most = int(wanted.max())

    def record(
        self,
        plan: Plan,
        packed: Packed,
        token: Tensor,
        used: Tensor,
        rows_of: Callable[[Tensor], Tensor],
    ) -> None:
        """Score what a forward decided.

        Args:
            packed: the rows of logits.
            token: [B, K] int64, what was chosen for each row.
            used: [B, K] bool, whether it was taken.
            rows_of: logits [n, V] float32 of packed rows [n] int64.
        """
        schedule = self._schedule
        for chosen in self._rows(packed, used).split(self._chunk):
            own = Packed(packed.owner[chosen], packed.place[chosen], None)
            row = predicted(plan, schedule.batch, own.owner, own.place)
            named = self._named_of(schedule.batch.slot[own.owner])
            found = score(rows_of(chosen), own.of(token), self._most, self._normalized, named)
            taken = own.of(used)
            if packed.valid is not None:
                taken &= packed.valid[chosen]
            slot = torch.where(taken, schedule.batch.slot[own.owner], self._shape[0] - 1)
            place = row.position % self._shape[1]
            width = found.token.shape[1]
            self._token[slot, place, :width] = found.token.int()
            self._value[slot, place, :width] = found.value
            self._rank[slot, place] = found.rank.int()

    def _named_of(self, slot: Tensor) -> Tensor | None:
        """[n, k] int64: tokens that the requests in `slot` [n] name, -1 where they do not; None: no
        request of the schedule does."""
        if not self._names[self._schedule.slots].any():
            return None
        return pad(self._named[slot], (0, self._most - self._named.shape[1]), value=-1)

    def _rows(self, packed: Packed, used: Tensor) -> Tensor:
        """[n] int64: packed rows of the requests that ask; where shapes may depend on values, those
        that are used."""
        facts = self._schedule.facts
        if facts.static:
            rows = self._asking[:, None] * facts.rows + np.arange(facts.rows)
            return async_tensor_h2d(rows.flatten(), device=self._device)
        asks = torch.zeros(len(used), dtype=torch.bool)
        asks[torch.from_numpy(self._asking)] = True
        return (asks[packed.owner] & packed.of(used)).nonzero()[:, 0]

    def collect(self, emitted: Tensor) -> LogprobsTensors | None:
        """Scores of tokens [B, E] int64 that requests may have emitted, as the runner hands them to
        the scheduler; None: no request of the schedule asks.

        A token that no row decided, the end of thinking that a budget forces, has the score 0.
        """
        if not self.asked:
            return None
        count, most, width = len(self._asking), emitted.shape[1], self._most + 1
        who = async_tensor_h2d(self._asking, device=self._device)
        slot = self._schedule.batch.slot[who][:, None]
        place = self._first[who][:, None] + torch.arange(most, device=self._device)
        place %= self._shape[1]
        # Where a request's rows begin; of one that does not ask nothing is read.
        begin = np.zeros(len(self._schedule.slots), np.int64)
        begin[self._asking] = np.arange(count) * most
        own = emitted[who].int()[..., None]
        named = self._named_of(slot[:, 0])
        token, value = self._token[slot, place, :width], self._value[slot, place, :width]
        forced = token[..., :1] != own
        rank = torch.arange(width, dtype=torch.int32, device=self._device)
        alone = ((own + rank) % self._vocab_size).expand_as(token)
        if named is not None:
            beside = pad(named, (1, 0), value=-1)[:, None].int()
            alone = torch.where(beside >= 0, beside, alone)
        return LogprobsTensors(
            torch.where(forced, alone, token).flatten(0, 1),
            torch.where(forced, torch.where(alone == own, 0, -torch.inf), value).flatten(0, 1),
            torch.where(forced[..., 0], 1, self._rank[slot, place]).flatten(),
            cu_num_generated_tokens=begin.tolist(),
        )
