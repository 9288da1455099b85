# SPDX-License-Identifier: Apache-2.0
"""Per-request decoding state, on the host.

A request's canvas starts where its committed text ends; its first token, the seed, is known. Its
phase follows from the canvas: one with masked positions is denoised, a full one is committed.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.sampling_params import SamplingParams

from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.decoding.rules import CONFIDENCE, RULES
from vllm_nbdiff.engine.constraints import Constraints
from vllm_nbdiff.request import DEFAULT_DRAFT_STEPS, parse_options

_NO_LIMIT = 1 << 30
NO_TOKEN = -1


class CanvasState:
    """Arrays indexed by the runner's request slot; L is the served block length."""

    def __init__(
        self, config: BlockDiffusionConfig, num_slots: int, max_model_len: int, seed: int | None
    ) -> None:
        """
        Args:
            config: of the served model.
            num_slots: largest number of requests.
            max_model_len: tokens a request may have.
            seed: of the engine; gives unseeded requests their seeds.
        """
        self.config = config
        self.max_model_len = max_model_len

        def column(value: float, dtype: type) -> np.ndarray:
            return np.full(num_slots, value, dtype=dtype)

        self.tokens = np.full((num_slots, config.block_length), config.mask_token_id, np.int64)
        self.start = column(0, np.int64)  # position of canvas column 0
        self.width = column(0, np.int64)
        self.step = column(0, np.int64)  # denoise steps done on the canvas
        # Seed of the next block as the last denoise step of this one predicts it.
        self.guess = column(NO_TOKEN, np.int64)
        # First column of the sub-block whose KV and that of the rest of the canvas are cached.
        self.cached = column(-1, np.int64)
        # `freedave`: what the last step proposed for positions it left masked, NO_TOKEN elsewhere.
        self.proposed = np.full_like(self.tokens, NO_TOKEN)
        self.rank = np.zeros(self.tokens.shape, np.float32)  # their confidence
        # Drafts whose own pages hold the text before the canvas.
        self.copied = column(0, np.int64)

        self.block_length = column(config.block_length, np.int64)
        self.sub_block_length = column(1, np.int64)
        self.rule: list[str] = ["confidence"] * num_slots
        self.score = column(CONFIDENCE, np.int64)
        self.threshold = column(1, np.float32)
        self.max_steps = column(_NO_LIMIT, np.int64)
        self.num_drafts = column(0, np.int64)  # canvases beside the canvas itself, `freedave` only
        self.verifies = column(False, np.bool_)  # text is what AR decoding gives
        self.auto = column(False, np.bool_)  # its width is chosen while serving
        self.fuses = column(False, np.bool_)
        self.caches = column(False, np.bool_)
        self.temperature = column(0, np.float32)
        self.top_p = column(1, np.float32)
        self.top_k = column(config.vocab_size, np.int64)
        self.min_p = column(0, np.float32)
        self.seed = column(0, np.int64)
        # Last position a request may return, and the tokens that end it.
        self.last_position = column(0, np.int64)
        self.stop_ids = np.full((num_slots, 1), NO_TOKEN, np.int64)
        self.constraints: dict[int, Constraints] = {}
        # Slots whose tokens need more than the argmax and its probability.
        self.needs_distribution = column(False, np.bool_)
        self._seeds = np.random.default_rng(seed)

    def add_request(self, slot: int, params: SamplingParams, prompt_len: int) -> None:
        """Set the state of a request, new or resumed; its canvas begins after prefill."""
        options = parse_options(params.extra_args, self.config)
        assert options.small_blocks is not None and options.threshold is not None
        drawn = int(self._seeds.integers(-(1 << 63), (1 << 63) - 1))
        self.auto[slot] = options.mode == "auto"
        self.verifies[slot] = lossless = options.mode != "diffusion"
        self.block_length[slot] = options.block_length
        self.sub_block_length[slot] = options.block_length // options.small_blocks
        self.rule[slot] = options.algorithm
        self.score[slot] = RULES[options.algorithm].score
        self.threshold[slot] = options.threshold
        self.max_steps[slot] = options.max_steps or _NO_LIMIT
        self.num_drafts[slot] = options.num_drafts
        if lossless:
            self.set_draft_length(slot, options.draft_width)
            self.max_steps[slot] = options.draft_steps or DEFAULT_DRAFT_STEPS
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.top_k[slot] = params.top_k if params.top_k > 0 else self.config.vocab_size
        self.min_p[slot] = params.min_p
        self.seed[slot] = drawn if params.seed is None else params.seed
        assert params.max_tokens is not None
        self.last_position[slot] = min(prompt_len + params.max_tokens, self.max_model_len) - 1
        self._set_stop_ids(slot, params)
        self.constraints.pop(slot, None)
        constraints = Constraints.from_params(params, torch.device("cpu"))
        if constraints is not None:
            self.constraints[slot] = constraints
        self.fuses[slot] = options.fused_commit and constraints is None
        self.caches[slot] = options.block_cache
        self.needs_distribution[slot] = (
            params.temperature != 0
            or RULES[options.algorithm].score != CONFIDENCE
            or constraints is not None
        )

    def set_draft_length(self, slots: int | np.ndarray, length: int) -> None:
        """Draft `length` tokens, the seed included, on canvases that begin from now on."""
        self.block_length[slots] = length
        self.sub_block_length[slots] = length

    def _set_stop_ids(self, slot: int, params: SamplingParams) -> None:
        ids = list(params.stop_token_ids or ())
        if params.eos_token_id is not None:
            ids.append(params.eos_token_id)
        missing = len(ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        self.stop_ids[slot] = NO_TOKEN
        self.stop_ids[slot, : len(ids)] = ids

    def is_last(self, slots: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Whether `tokens` [n, ...] at `positions` end their requests; NO_TOKEN never does."""
        shape = (len(slots),) + (1,) * (tokens.ndim - 1)
        stops = (tokens[..., None] == self.stop_ids[slots].reshape(*shape, -1)).any(-1)
        return (stops & (tokens != NO_TOKEN)) | (
            positions == self.last_position[slots].reshape(shape)
        )

    def remove_request(self, slot: int) -> None:
        """Forget a finished or preempted request."""
        self.constraints.pop(slot, None)

    def begin(self, slots: np.ndarray, start: np.ndarray, seeds: np.ndarray) -> None:
        """Begin canvases at position `start` [n] with the first tokens `seeds` [n]."""
        self.tokens[slots] = self.config.mask_token_id
        self.tokens[slots, 0] = seeds
        self.start[slots] = start
        self.width[slots] = self.width_at(slots, start)
        self.step[slots] = 0
        self.guess[slots] = NO_TOKEN
        self.cached[slots] = -1
        self.proposed[slots] = NO_TOKEN
        self.copied[slots] = 0

    def width_at(self, slots: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Columns of a canvas at position `start` [n]; less than 1 where there is no room.

        Diffusion decides a block as a whole, so it is cut only by `max_model_len`.
        """
        width = np.minimum(self.block_length[slots], self.max_model_len - start)
        wanted = self.last_position[slots] - start + 1
        return np.where(self.verifies[slots], np.minimum(width, wanted), width)
