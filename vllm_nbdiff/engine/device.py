# SPDX-License-Identifier: Apache-2.0
"""Decoding decided on the device: between two forwards nothing is read back to the host.

The state of a request is its row of the canvas table, whose tokens are the runner's draft tokens,
so the runner's own rows are the forward's: every canvas is one segment, with a causal flag. What
runs here are modes `diffusion`, `verify` and `ar` without options that need the host; requests with
such options, and their batches, are decoded by `loop.py`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.states import RequestState

from vllm_nbdiff.decoding.rules import CONFIDENCE, ENTROPY, MARGIN
from vllm_nbdiff.engine.canvas import NO_TOKEN, CanvasState
from vllm_nbdiff.engine.counts import pack_uniform
from vllm_nbdiff.engine.plan import Batch
from vllm_nbdiff.kernels.canvas_advance import PAD, canvas_advance
from vllm_nbdiff.kernels.canvas_rows import CanvasRows, canvas_rows
from vllm_nbdiff.kernels.canvas_table import CanvasTable, Kind, Mode, ScheduledBatch
from vllm_nbdiff.kernels.canvas_update import SelectionRule, canvas_update
from vllm_nbdiff.kernels.logits import GREEDY_BELOW
from vllm_nbdiff.kernels.row_sample import row_sample
from vllm_nbdiff.kernels.row_statistics import row_statistics

RULES = {
    "confidence": SelectionRule.THRESHOLD,
    "entropy": SelectionRule.THRESHOLD,
    "margin": SelectionRule.THRESHOLD,
    "factor": SelectionRule.FACTOR,
    "entropy_bound": SelectionRule.ENTROPY_BOUND,
    "entropy_threshold": SelectionRule.ENTROPY_THRESHOLD,
}
"""Algorithms that the kernels know."""

_INT32_MAX = (1 << 31) - 1


class DeviceDecoder:
    """State on the device and one forward's decisions."""

    def __init__(self, state: CanvasState, req_states: RequestState, device: torch.device) -> None:
        """
        Args:
            state: of the host: options of every request; also its canvas while `loop.py` decodes.
            req_states: of the runner; its draft tokens become the canvases.
            device: of the model.
        """
        self.state = state
        self.req_states = req_states
        self.device = device
        slots = len(state.start)

        def column(dtype: torch.dtype = torch.int32, value: float = 0) -> torch.Tensor:
            return torch.full((slots,), value, dtype=dtype, device=device)

        self.table = CanvasTable(
            tokens=req_states.draft_tokens,
            causal=column(value=1),
            step=column(),
            block_length=column(value=1),
            sub_block_length=column(value=1),
            max_steps=column(value=1),
            verifies=column(),
            last_position=column(),
        )
        self.rule, self.top_k, self.score = column(), column(), column()
        self.seed = column(torch.int64)
        self.threshold, self.temperature = column(torch.float32), column(torch.float32)
        self.top_p, self.min_p = column(torch.float32, 1), column(torch.float32)
        # Added to logits of text and of random draws, which never give the mask.
        self._ban = torch.zeros(state.config.vocab_size, device=device)
        self._ban[state.config.mask_token_id] = -torch.inf
        self._no_eos = torch.empty(0, dtype=torch.int32, device=device)
        self._served = np.zeros(slots, np.bool_)
        self._changed: set[int] = set()
        self._batch: ScheduledBatch | None = None
        self._rows: CanvasRows | None = None
        self._host: InputBatch | None = None

    def add_request(self, slot: int) -> None:
        """Take over the options of a request, new or resumed, before its next forward."""
        self._changed.add(slot)
        self._served[slot] = self._can_serve(slot)

    def serves(self, host: InputBatch) -> bool:
        """Whether all scheduled requests can be decoded here."""
        return bool(self._served[host.idx_mapping_np[: host.num_reqs]].all())

    def _can_serve(self, slot: int) -> bool:
        """Whether the kernels have all that the request of `slot` asks for."""
        state = self.state
        rule = state.rule[slot]
        plain = not (state.auto[slot] or state.fuses[slot] or state.caches[slot])
        if not plain or slot in state.constraints or rule not in RULES:
            return False
        if state.temperature[slot] == 0:
            return True
        # The kernels know a filtered distribution by the probability of its draw alone, and judge
        # every filter on the unfiltered one.
        return state.score[slot] == CONFIDENCE and not (
            state.min_p[slot] > 0 and state.top_p[slot] < 1
        )

    def begin(self, host: InputBatch) -> torch.Tensor:
        """Choose the rows of logits for the scheduled batch.

        Returns:
            [B * R] int64, rows of the runner's forward.
        """
        self.upload_options()
        kind = _kinds(host)
        self._host = host
        self._batch = ScheduledBatch(
            slot=host.idx_mapping[: host.num_reqs],
            kind=async_tensor_h2d(kind, device=self.device),
            query_start=host.query_start_loc,
            seq_len=host.seq_lens,
        )
        self._rows = canvas_rows(
            self.table,
            self._batch,
            num_rows=self._num_rows(host.idx_mapping_np[: host.num_reqs][kind == Kind.CANVAS]),
            mask_token_id=self.state.config.mask_token_id,
            max_model_len=self.state.max_model_len,
            check_values=False,
        )
        return self._rows.row.flatten()

    def causal(self, slots: torch.Tensor) -> torch.Tensor:
        """[B] int32, whether the forward of `slots` [B] reads text."""
        return self.table.causal[slots]

    def _num_rows(self, slots: np.ndarray) -> int:
        """Most rows that one of the canvases `slots` needs."""
        if not len(slots):
            return 1
        state = self.state
        whole = state.verifies[slots] | (state.max_steps[slots] < state.block_length[slots])
        rows = np.where(whole, state.block_length[slots], state.sub_block_length[slots])
        return int(rows.max())

    def step(self, logits: torch.Tensor) -> SamplerOutput:
        """Decide the forward whose rows `begin` chose, given their logits [B * R, V]."""
        batch, rows, host = self._batch, self._rows, self._host
        assert batch is not None and rows is not None and host is not None
        config = self.state.config
        slot = batch.slot[:, None].expand_as(rows.needed).flatten()
        needed = rows.needed.flatten()
        greedy = self.temperature[slot] < GREEDY_BELOW.value
        fills = needed == Mode.FILL
        drawn = self._draw(logits, rows, slot, (needed != 0) & ~greedy)
        found = row_statistics(logits, needed=fills & greedy)
        token, probability = found.token, found.probability
        if drawn is not None:
            token = torch.where(greedy, token, drawn.token)
            probability = torch.where(greedy, probability, drawn.probability)
        kind = self.score[slot]
        score = torch.where(kind == MARGIN, found.margin, probability)
        score = torch.where(kind == ENTROPY, -found.entropy, score)

        shape = rows.needed.shape
        update = canvas_update(
            self.table.tokens,
            token.view(shape),
            probability.view(shape),
            score.view(shape),
            found.entropy.view(shape),
            mask_token_id=config.mask_token_id,
            eos_token_ids=self._no_eos,
            rule=self.rule,
            parameter=self.threshold,
            sub_block_length=self.table.sub_block_length,
            active=rows.mode == Mode.FILL,
            slot=batch.slot,
            quota=rows.quota,
            compact=True,
            check_values=False,
        )
        stuck = (update.num_filled == 0)[:, None].expand(shape).flatten()
        text = (needed != 0) & ~fills
        best = row_statistics(logits, bias=self._ban, needed=(text & greedy) | (fills & stuck))
        token = best.token
        if drawn is not None:
            token = torch.where(text & ~greedy, drawn.token, token)
        emission = canvas_advance(
            self.table,
            batch,
            rows,
            token.view(shape),
            best.probability.view(shape),
            update.num_filled,
            mask_token_id=config.mask_token_id,
            max_model_len=self.state.max_model_len,
            check_values=False,
        )
        canvas = _kinds(host) == Kind.CANVAS
        counts = pack_uniform(np.where(canvas, host.num_scheduled_tokens[: host.num_reqs], 0))
        return SamplerOutput(
            sampled_token_ids=emission.tokens,
            logprobs_tensors=None,
            num_nans=async_tensor_h2d(counts, device=self.device),
            num_sampled=emission.num_emitted,
            num_rejected=emission.num_rejected,
        )

    def _draw(
        self, logits: torch.Tensor, rows: CanvasRows, slot: torch.Tensor, needed: torch.Tensor
    ) -> Any:
        """Random draws of the rows `needed`, None where the batch is greedy throughout."""
        assert self._host is not None
        slots = self._host.idx_mapping_np[: self._host.num_reqs]
        state = self.state
        if not state.temperature[slots].any():
            return None
        # All filters or none: every combination would be a kernel of its own to compile.
        filtered = (
            (state.top_k[slots] < state.config.vocab_size)
            | (state.top_p[slots] < 1)
            | (state.min_p[slots] > 0)
        )
        filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return row_sample(
            logits,
            seed=self.seed[slot],
            position=rows.position.flatten(),
            step=rows.step.flatten(),
            temperature=self.temperature[slot],
            bias=self._ban,
            needed=needed,
            **{name: column[slot] for name, column in filters.items() if filtered.any()},
        )

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernels of a step before the first request needs them.

        Args:
            dtype: of the model's logits.
        """
        state, length = self.state, self.table.tokens.shape[1]
        one = np.ones(1, np.int64)
        host: Any = SimpleNamespace(
            num_reqs=1,
            idx_mapping=torch.zeros(1, dtype=torch.int64, device=self.device),
            idx_mapping_np=0 * one,
            num_draft_tokens_per_req=length * one,
            num_scheduled_tokens=length * one,
            num_computed_prefill_tokens_np=one,
            prefill_len_np=one,
            query_start_loc=torch.tensor([0, length], dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor([length + 1], dtype=torch.int32, device=self.device),
        )
        # Greedy, sampled, filtered.
        for temperature, min_p in ((0.0, 0.0), (1.0, 0.0), (1.0, 0.1)):
            state.temperature[0], state.min_p[0] = temperature, min_p
            self._changed.add(0)
            rows = self.begin(host)
            shape = len(rows), state.config.vocab_size
            self.step(torch.zeros(shape, dtype=dtype, device=self.device))
        state.temperature[0] = state.min_p[0] = 0
        self.table.tokens[0] = 0
        self._changed.add(0)

    def upload_options(self) -> None:
        """Bring the options of new requests to the device, in two copies."""
        if not self._changed:
            return
        slots = np.array(sorted(self._changed))
        self._changed.clear()
        state, table = self.state, self.table
        rules = np.array([RULES.get(state.rule[slot], 0) for slot in slots.tolist()])
        whole = {
            table.causal: np.ones_like(slots),
            table.step: np.zeros_like(slots),
            table.block_length: state.block_length[slots],
            table.sub_block_length: state.sub_block_length[slots],
            table.max_steps: state.max_steps[slots],
            table.verifies: state.verifies[slots],
            table.last_position: state.last_position[slots].clip(max=_INT32_MAX),
            self.rule: rules,
            self.score: state.score[slots],
            self.top_k: state.top_k[slots],
            self.seed: state.seed[slots],
        }
        real = {
            self.threshold: state.threshold[slots],
            self.temperature: state.temperature[slots],
            self.top_p: state.top_p[slots],
            self.min_p: state.min_p[slots],
        }
        index = async_tensor_h2d(slots, device=self.device)
        for columns, dtype in ((whole, np.int64), (real, np.float32)):
            values = async_tensor_h2d(
                np.stack([value.astype(dtype) for value in columns.values()]), device=self.device
            )
            for column, value in zip(columns, values, strict=True):
                column[index] = value.to(column.dtype)

    def pull(self, batch: Batch) -> None:
        """Bring canvases to the host, for a batch that is decoded there. Synchronises."""
        slots = batch.slots[~batch.prefilling & self._served[batch.slots]]
        state, index = self.state, torch.from_numpy(slots).to(self.device)
        state.tokens[slots] = self.table.tokens[index].cpu().numpy()
        state.step[slots] = self.table.step[index].cpu().numpy()
        state.start[slots] = self.req_states.num_computed_tokens.gpu[index].cpu().numpy()
        state.width[slots] = state.width_at(slots, state.start[slots])
        state.guess[slots] = NO_TOKEN
        state.cached[slots] = -1

    def push(self, batch: Batch) -> None:
        """Take canvases back from the host."""
        begun = ~batch.prefilling | batch.prefill_ends
        slots = batch.slots[begun & self._served[batch.slots]]
        state, index = self.state, torch.from_numpy(slots).to(self.device)
        within = np.arange(state.tokens.shape[1]) < state.width[slots][:, None]
        tokens = np.where(within, state.tokens[slots], PAD.value)
        masked = (tokens == state.config.mask_token_id).any(1)
        drafted = state.verifies[slots] & (state.step[slots] >= state.max_steps[slots])
        causal = (~masked | drafted).astype(np.int32)
        self.table.tokens[index] = torch.from_numpy(tokens).to(self.device)
        self.table.step[index] = torch.from_numpy(state.step[slots].astype(np.int32)).to(
            self.device
        )
        self.table.causal[index] = torch.from_numpy(causal).to(self.device)


def _kinds(host: InputBatch) -> np.ndarray:
    """[B] int32 of `Kind`."""
    count = host.num_reqs
    assert host.num_draft_tokens_per_req is not None
    scheduled = host.num_computed_prefill_tokens_np[:count] + host.num_scheduled_tokens[:count]
    prompt = np.where(scheduled >= host.prefill_len_np[:count], Kind.PROMPT_END, Kind.PROMPT)
    prefilling = host.num_draft_tokens_per_req[:count] == 0
    return np.where(prefilling, prompt, Kind.CANVAS).astype(np.int32)
