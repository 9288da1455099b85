# SPDX-License-Identifier: Apache-2.0
"""The hooks of model runner V2.

A batch is decoded on the device (`device.py`) in the runner's own rows, or on the host (`loop.py`)
in rows of its own: on CPU, and where a request has options that the device cannot serve.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_nbdiff import compat
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.engine.canvas import CanvasState
from vllm_nbdiff.engine.counts import pack
from vllm_nbdiff.engine.decoder import Decoder
from vllm_nbdiff.engine.drafts import draft_room
from vllm_nbdiff.engine.loop import ForwardLoop
from vllm_nbdiff.engine.plan import Batch
from vllm_nbdiff.engine.sampler import RowSampler
from vllm_nbdiff.engine.segments import PagedBatch, SegmentForward

if TYPE_CHECKING:
    from vllm_nbdiff.engine.device import DeviceDecoder

_CPU_STEPS_PER_SCHEDULE = 16


class NBDiffModelState(ModelState):
    """Block-diffusion state of one worker."""

    num_new_sampled_tokens_per_step = 0

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        compat.register_cpu_kernels()
        compat.ignore_grammar_of_warm_up()
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config = BlockDiffusionConfig.from_vllm_config(vllm_config)
        self.canvas: CanvasState | None = None
        self.decoder: Decoder | None = None
        self.loop: ForwardLoop | None = None
        self.device_decoder: DeviceDecoder | None = None
        self._model = model
        self._forward: SegmentForward | None = None
        self._slot_of: dict[str, int] = {}
        # CUDA graphs read it.
        self._causal = torch.ones(self.max_num_reqs, dtype=torch.int32, device=device)

    def _steps_per_schedule(self) -> int:
        wanted = self.config.engine.max_steps_per_schedule
        if self.vllm_config.kv_transfer_config is not None:
            return 1
        if wanted is not None:
            return wanted
        return _CPU_STEPS_PER_SCHEDULE if self.device.type == "cpu" else 1

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Replace vLLM's sampler by ours."""
        req_states: RequestState = sampler.req_states
        scheduler = self.vllm_config.scheduler_config
        self.canvas = CanvasState(
            self.config,
            req_states.max_num_reqs,
            self.model_config.max_model_len,
            self.model_config.seed,
        )
        # The async scheduler would put the pages of an uncommitted block into the prefix cache.
        ends_early = not scheduler.async_scheduling
        self.decoder = Decoder(self.canvas, RowSampler(self.canvas, req_states), ends_early)
        self.loop = ForwardLoop(
            self._model, self.decoder, self.vllm_config, self.device, self._steps_per_schedule()
        )
        if self.config.decoder == "device":
            from vllm_nbdiff.engine.device import DeviceDecoder

            self.device_decoder = DeviceDecoder(self.canvas, req_states, self.device)
        return NBDiffSampler(self.loop, self.device_decoder), None

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        """Called when all is loaded, before graphs are captured."""
        if self.device_decoder is not None:
            self.device_decoder.warm_up(self.dtype)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        assert self.canvas is not None and new_req_data.sampling_params is not None
        self._slot_of[new_req_data.req_id] = req_index
        self.canvas.add_request(req_index, new_req_data.sampling_params, new_req_data.prompt_len)
        if self.device_decoder is not None:
            self.device_decoder.add_request(req_index)

    def remove_request(self, req_id: str) -> None:
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            assert self.canvas is not None
            self.canvas.remove_request(slot)

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        req_states: RequestState,
    ) -> torch.Tensor | None:
        return None

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The forward that `prepare_attn` planned, for the model in place of the runner's rows."""
        forward, self._forward = self._forward, None
        return {} if forward is None else {"segments": forward}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Choose the rows that get logits, and plan a forward that is not the runner's own."""
        assert self.loop is not None
        dummy = input_batch.num_draft_tokens_per_req is None
        device = self.device_decoder
        if device is not None and not dummy:
            device.upload_options()
            if device.serves(input_batch):
                input_batch.logits_indices = device.begin(input_batch)
                self._causal[: input_batch.num_reqs] = device.causal(
                    input_batch.idx_mapping[: input_batch.num_reqs]
                )
                dummy = True
        if not dummy:
            paged = PagedBatch(
                attn_groups, block_tables, kv_cache_config, self.vllm_config, self.device
            )
            batch = self._make_batch(input_batch, paged.page_size)
            if device is not None:
                device.pull(batch)
            forward = self.loop.begin(batch, paged)
            if forward is not None and cudagraph_mode != CUDAGraphMode.FULL:
                self._forward = forward
                input_batch.logits_indices = self.loop.needed_rows()
                return forward.metadata
            # A graph replays the runner's rows whatever is planned: it must not write KV, and the
            # planned forward follows it.
            slot_mappings.fill_(PAD_SLOT_ID)
            self.loop.postponed = forward is not None
            input_batch.logits_indices = torch.zeros(1, dtype=torch.int64, device=self.device)
        return self._runner_metadata(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config
        )

    def _runner_metadata(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> dict[str, Any]:
        """Attention metadata of the rows that the runner prepared."""
        num_reqs, num_tokens = input_batch.num_reqs, input_batch.num_tokens
        if cudagraph_mode == CUDAGraphMode.FULL:
            num_reqs = input_batch.num_reqs_after_padding
            num_tokens = input_batch.num_tokens_after_padding
        longest = input_batch.max_query_len or int(input_batch.num_scheduled_tokens.max())
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            query_start_loc_gpu=input_batch.query_start_loc,
            query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np),
            max_query_len=longest,
            seq_lens=input_batch.seq_lens,
            max_seq_len=self.max_model_len,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
            positions=input_batch.positions,
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np),
            causal=self._causal[:num_reqs],
        )

    def _make_batch(self, input_batch: InputBatch, page_size: int) -> Batch:
        assert self.canvas is not None
        num_reqs = input_batch.num_reqs
        slots = input_batch.idx_mapping_np[:num_reqs].astype(np.int64)
        scheduled = input_batch.num_scheduled_tokens[:num_reqs].astype(np.int64)
        prefilling = input_batch.num_draft_tokens_per_req[:num_reqs] == 0
        computed = input_batch.num_computed_prefill_tokens_np[:num_reqs].astype(np.int64)
        prompt_len = input_batch.prefill_len_np[:num_reqs]
        # The scheduler gives every canvas the pages of one more block, and of drafts.
        spare = draft_room(self.canvas.num_drafts[slots], scheduled, page_size)
        room = self.canvas.start[slots] + scheduled + self.config.block_length + spare
        return Batch(
            slots=slots,
            scheduled=scheduled,
            prefilling=prefilling,
            prefill_ends=prefilling & (computed + scheduled >= prompt_len),
            computed=computed,
            room=np.minimum(room, self.canvas.max_model_len),
            page_size=page_size,
            prompt_ids=input_batch.input_ids[: input_batch.num_tokens].cpu().numpy(),
            prompt_start=input_batch.query_start_loc_np[:num_reqs],
            max_rows=self.vllm_config.scheduler_config.max_num_batched_tokens,
        )


class NBDiffSampler:
    """Stands in for vLLM's `Sampler` in model runner V2.

    It reports, per request, the tokens whose KV is final or that end it; of the canvas that was
    scheduled the rest counts as rejected. `num_nans` carries what the forwards cost, which the
    scheduler reads (`NBDiffScheduler.update_from_output`).
    """

    def __init__(self, loop: ForwardLoop, device_decoder: DeviceDecoder | None) -> None:
        self.loop = loop
        self.device_decoder = device_decoder
        # The runner updates this table of [max_num_reqs, V] when it exists; penalties are computed
        # here from the tokens themselves.
        self.penalties_state = SimpleNamespace(output_bin_counts=None)
        self.compute_nans = False

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Done by `NBDiffModelState.add_request`."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Decide the forward, given the logits [n, V] of its needed rows, and run what follows."""
        device, decoder = self.loop.device, self.device_decoder
        if input_batch.num_draft_tokens_per_req is None:  # a dummy batch
            none = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=device)
            return SamplerOutput(none[:, None].long(), None, None, none, none)
        if decoder is not None and decoder.serves(input_batch):
            return decoder.step(logits)
        emitted, batch = self.loop.run(logits), self.loop.batch
        if decoder is not None:
            decoder.push(batch)
        rejected = np.where(batch.prefilling, 0, batch.scheduled - emitted.count)
        return SamplerOutput(
            sampled_token_ids=torch.from_numpy(emitted.tokens).to(device),
            logprobs_tensors=None,
            num_nans=torch.from_numpy(pack(emitted)).to(device),
            num_sampled=torch.from_numpy(emitted.count.astype(np.int32)).to(device),
            num_rejected=torch.from_numpy(rejected.astype(np.int32)).to(device),
        )
