# SPDX-License-Identifier: Apache-2.0
"""What a schedule decided, as the runner takes it from a sampler."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_nbdiff.engine.counts import CountedOutput, count_nans
from vllm_nbdiff.engine.loop import ForwardLoop


class NBDiffSampler:
    """Stands in for vLLM's `Sampler` in model runner V2.

    It reports, per request, the tokens whose KV is final or that end it; of the canvas that was
    scheduled the rest counts as rejected.

    Order: `GPUModelRunner.sample` (vllm/v1/worker/gpu/model_runner.py):
    `input_batch.logits_indices`, `model.compute_logits`, `self.sampler`.
    Upstream: `GPUModelRunner.add_requests`, `GPUModelRunner.postprocess_sampled`,
    `GPUModelRunner._dummy_sampler_run` (vllm/v1/worker/gpu/model_runner.py).
    """

    def __init__(self, loop: ForwardLoop, compute_nans: bool, most_rows: int = 0) -> None:
        """With rows of logits that a forward may have, for vLLM's memory profile."""
        self.loop = loop
        self.most_rows = most_rows
        self.compute_nans = compute_nans
        # The runner updates this table of [max_num_reqs, V] when it exists; penalties are computed
        # here from the tokens themselves.
        self.penalties_state = SimpleNamespace(output_bin_counts=None)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Done by `NBDiffModelState.add_request`."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Decide the forward, given the logits [n, V] of its needed rows, and run what follows."""
        if input_batch.num_draft_tokens_per_req is None:  # a dummy batch
            # It has a row for each request, and its peak is what the KV cache leaves free: logits,
            # and the copy of rows whose tokens are constrained.
            shape = self.most_rows, logits.shape[1]
            _ = logits.new_empty(shape), logits.new_empty(shape, dtype=torch.float32)
            none = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=logits.device)
            return SamplerOutput(none[:, None].long(), None, None, none, none)
        decoder = self.loop.decoder
        nans = None
        if self.compute_nans:
            nans = count_nans(logits, decoder.row_owners(), input_batch.num_reqs)
        self.loop.run(logits)
        emitted, batch = decoder.emitted, decoder.schedule.batch
        count = emitted.count
        if decoder.tally.broken is not None:
            count = torch.where(decoder.tally.broken > 0, 0, count)
        rejected = torch.where(batch.decodes, batch.scheduled - count, 0)
        return CountedOutput(
            sampled_token_ids=emitted.tokens,
            logprobs_tensors=decoder.sampler.logprobs.collect(emitted.tokens),
            num_nans=nans,
            num_sampled=count.int(),
            num_rejected=rejected.int(),
            sampling_mask_tensors=decoder.steps.collect(emitted.tokens.shape[1]),
            counts=decoder.tally.columns(batch.decodes),
            graph=self.loop.graph,
        )
