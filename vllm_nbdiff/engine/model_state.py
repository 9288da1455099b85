# SPDX-License-Identifier: Apache-2.0
"""The hooks of model runner V2."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_nbdiff import compat
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.decoding.canvas import CanvasTable
from vllm_nbdiff.engine.adapters import AdapterTable
from vllm_nbdiff.engine.attention import SegmentAttentionImpl
from vllm_nbdiff.engine.auto import AutoDrafts
from vllm_nbdiff.engine.constraints import ConstraintTable
from vllm_nbdiff.engine.decided import NBDiffSampler
from vllm_nbdiff.engine.decoder import Decoder
from vllm_nbdiff.engine.forward import PagedBatch
from vllm_nbdiff.engine.grammars import GrammarTable
from vllm_nbdiff.engine.graph_segments import GraphBuffers
from vllm_nbdiff.engine.kv_copies import KVCopies
from vllm_nbdiff.engine.logprobs import LogprobTable
from vllm_nbdiff.engine.lookahead import logit_rows, lookahead_tokens, row_limit
from vllm_nbdiff.engine.loop import ForwardLoop
from vllm_nbdiff.engine.options import OptionTable
from vllm_nbdiff.engine.ranks import alone, of_first_rank
from vllm_nbdiff.engine.sampler import RowSampler
from vllm_nbdiff.engine.schedule import ScheduleReader
from vllm_nbdiff.engine.step_map import StepTable
from vllm_nbdiff.engine.warm_up import warm_up
from vllm_nbdiff.graphs import refuse_graphs

_CPU_STEPS_PER_SCHEDULE = 16
_SECONDS_PER_SCHEDULE = 0.1


class NBDiffModelState(ModelState):
    """Block-diffusion state of one worker."""

    num_new_sampled_tokens_per_step = 0
    loop: ForwardLoop
    reader: ScheduleReader
    adapters: AdapterTable | None

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        compat.register_cpu_kernels()
        compat.carry_counts()
        compat.capture_any_decode()
        compat.ignore_grammar_of_warm_up()
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config = BlockDiffusionConfig.from_vllm_config(vllm_config)
        self._model = model
        self._slot_of: dict[str, int] = {}
        self._page_size = 0
        self._row_limit = row_limit(vllm_config, self.config)
        self._lookahead = np.zeros(self.max_num_reqs + 1, np.int64)
        self._copies = KVCopies()
        self._graph: GraphBuffers | None = None

    def _steps_per_schedule(self) -> int:
        if self.config.static_shapes:
            return 1
        return self.config.engine.max_steps_per_schedule or _CPU_STEPS_PER_SCHEDULE

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Replace vLLM's sampler by ours."""
        config, states = self.config, sampler.req_states
        scheduler, slots = self.vllm_config.scheduler_config, states.max_num_reqs
        self.table = CanvasTable(slots, config.block_length, config.vocab_size, self.device)
        self.options = OptionTable(
            config,
            slots,
            self.model_config.max_model_len,
            self._row_limit,
            self.model_config.seed,
            self.device,
        )
        self.constraints = ConstraintTable(
            slots, config.vocab_size, states.all_token_ids.gpu, config.end_think_token_id
        )
        most_rows = logit_rows(self.vllm_config, config) if config.static_shapes else 0
        self.reader = ScheduleReader(
            self.options,
            self.table,
            self.constraints.text,
            self._lookahead,
            config.static_shapes,
            most_rows or scheduler.max_num_batched_tokens,
            self.device,
        )
        self.logprobs = LogprobTable(
            slots,
            config.block_length,
            config.vocab_size,
            self.model_config.logprobs_mode,
            self.device,
        )
        self.grammars = GrammarTable(
            self.vllm_config, slots, self.constraints.text, config.mask_token_id
        )
        rows = RowSampler(self.constraints, self.grammars, self.logprobs, config.mask_token_id)
        self.steps = StepTable(slots, config.block_length, self.device)
        decoder = Decoder(self.table, self.options, rows, self.steps)
        steps = self._steps_per_schedule()
        # Clocks differ between ranks.
        is_alone = config.tensor_parallel_size == 1
        agree, seconds = of_first_rank, math.inf
        if is_alone:
            agree, seconds = alone, _SECONDS_PER_SCHEDULE
        auto = AutoDrafts(self.options, steps, seconds, config.static_shapes, agree)
        self.adapters = self._make_adapters(slots)
        self.loop = ForwardLoop(self._model, decoder, auto, steps, seconds, self.adapters)
        profiled = most_rows and most_rows + slots  # a guessed seed each
        return NBDiffSampler(self.loop, sampler.compute_nans, profiled), None

    def _make_adapters(self, slots: int) -> AdapterTable | None:
        """Where the server has LoRA adapters."""
        if self.vllm_config.lora_config is None:
            return None
        scheduler, block = self.vllm_config.scheduler_config, self.config.block_length
        # Of one request: a text, a canvas and its drafts, a seed.
        rows = (2 + self.config.engine.max_drafts) * block + 1
        most = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * rows)
        compat.note_draft_only_adapters()
        model: Any = self._model
        model.adapters = AdapterTable(compat.map_rows_of_adapters(model, most), slots)
        return model.adapters

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        params = new_req_data.sampling_params
        assert params is not None
        self._slot_of[new_req_data.req_id] = req_index
        if self.adapters is not None:
            self.adapters.add_request(req_index, new_req_data.lora_request)
        prompt_len = new_req_data.prompt_len
        constrained = self.constraints.add_request(req_index, params, prompt_len)
        prompt = new_req_data.prompt_token_ids or []
        self.grammars.add_request(req_index, params, prompt)
        options = self.options.add_request(req_index, params, prompt_len, constrained)
        self.logprobs.add_request(
            req_index, self._logprobs_of(params), params.logprob_token_ids or ()
        )
        self.steps.add_request(req_index, options.step_map)
        self.reader.scores_prompt[req_index] = (
            params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
        )
        stops = set(params.stop_token_ids or ())
        if params.eos_token_id is not None:
            stops.add(params.eos_token_id)
        own = async_tensor_h2d(sorted(stops), dtype=torch.int64, device=self.device)
        self.table.set_stops(req_index, own)
        self.table.forget_proposals(req_index)
        self._lookahead[req_index] = lookahead_tokens(
            options, self.config, self._page_size, self._row_limit
        )

    def _logprobs_of(self, params: SamplingParams) -> int | None:
        """Tokens that a request wants beside its own; None: no log-probabilities."""
        asked, size = params.num_logprobs, self.config.vocab_size
        if params.logprob_token_ids:
            return asked
        return asked if asked is None else size if asked == -1 else min(asked, size)

    def remove_request(self, req_id: str) -> None:
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            self.constraints.remove_request(slot)
            self.logprobs.remove_request(slot)
            self.grammars.remove_request(slot)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: Any) -> None:
        """Called when all is loaded, before graphs are captured."""
        group = kv_cache_config.kv_cache_groups[0]
        self._page_size = group.kv_cache_spec.block_size
        causal = not self.config.family.block_causal
        if causal:
            self._copy_kv(group.layer_names)
        if not self.config.static_shapes:
            return
        layers = self.vllm_config.compilation_config.static_forward_context
        warm_up(self.vllm_config, (layers[name] for name in group.layer_names), self.device)
        scheduler, block = self.vllm_config.scheduler_config, self.config.block_length
        self._graph = GraphBuffers(
            scheduler.max_num_batched_tokens,
            self.max_num_reqs,
            block_tables.input_block_tables[0].shape[1],
            block,
            self.device,
            several=compat.uses_own_attention(self.vllm_config),
            copies_per_segment=min(self._page_size - 1, block) if causal else 0,
        )

    def _copy_kv(self, layer_names: list[str]) -> None:
        """Have these layers write what is copied."""
        refuse_graphs(self.vllm_config, copies_kv=True)
        layers = self.vllm_config.compilation_config.static_forward_context
        others = []
        for layer in (layers[name] for name in layer_names):
            if isinstance(layer.impl, SegmentAttentionImpl):
                layer.impl.copies = self._copies
            else:
                others.append(layer)
        compat.write_more_kv(others, self._copies.write)

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        req_states: RequestState,
    ) -> torch.Tensor | None:
        return None

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The forward that `prepare_attn` planned, where it has rows of its own.

        Order: `GPUModelRunner.execute_model` (vllm/v1/worker/gpu/model_runner.py):
        `model_state.prepare_attn`, `model_state.prepare_inputs`.
        """
        forward = self.loop.forward
        self.loop.forward = None
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
        """Plan the forward, and choose the rows that get logits."""
        paged = PagedBatch(
            input_batch,
            attn_groups,
            block_tables,
            slot_mappings,
            kv_cache_config,
            self.vllm_config,
            self._copies,
            self._graph if for_capture or cudagraph_mode == CUDAGraphMode.FULL else None,
        )
        if input_batch.num_draft_tokens_per_req is None:  # a dummy batch
            if paged.graph is not None:
                paged.graph.clear()
                return paged.of_graph(self.max_model_len)
            self._copies.clear()
            return paged.of_runner(self.max_model_len)
        self.options.upload()
        if self.config.static_shapes:
            self.loop.graph = cudagraph_mode.name.lower()
        schedule = self.reader.read(input_batch, paged.page_size, paged.most_segments)
        return self.loop.begin(schedule, paged)
