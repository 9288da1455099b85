# SPDX-License-Identifier: Apache-2.0
"""Options of all requests, by slot: parsed once, for the host and for the model's device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.decoding.canvas import NO_LIMIT, Options
from vllm_nbdiff.decoding.rules import CONFIDENCE, RULES
from vllm_nbdiff.engine.lookahead import fits_next_block, num_drafts
from vllm_nbdiff.request import parse_options
from vllm_nbdiff.request_options import RequestOptions

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES: tuple[Any, ...] = (np.int64, np.float32, np.bool_)
_FIRST_REAL, _FIRST_FLAG = (Options._fields.index(name) for name in ("threshold", "verifies"))
_WHOLE, _REAL = Options._fields[:_FIRST_REAL], Options._fields[_FIRST_REAL:_FIRST_FLAG]
_FLAGS = Options._fields[_FIRST_FLAG:]


class OptionTable:
    """A row for every slot, and a spare one for padding."""

    def __init__(
        self,
        config: BlockDiffusionConfig,
        num_slots: int,
        max_model_len: int,
        row_limit: int,
        seed: int | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            config: of the served model.
            num_slots: largest number of requests.
            max_model_len: tokens a request may have.
            row_limit: rows that one request may have in a forward.
            seed: of the engine; gives unseeded requests their seeds.
            device: of the model.
        """
        self.config = config
        self.max_model_len = max_model_len
        self.row_limit = row_limit
        groups = (_WHOLE, _REAL, _FLAGS)
        self._host = [
            np.zeros((num_slots + 1, len(names)), dtype)
            for names, dtype in zip(groups, _DTYPES, strict=True)
        ]
        columns = [table[:, i] for table in self._host for i in range(table.shape[1])]
        self.host: dict[str, np.ndarray] = dict(zip(Options._fields, columns, strict=True))
        """Columns by name, on the host."""
        self.is_auto = np.zeros(num_slots + 1, np.bool_)
        self._fill_padding(num_slots)
        # On a CPU both are the same memory.
        self._device = [torch.from_numpy(table).to(device) for table in self._host]
        self._shared = device.type == "cpu"
        self._changed: set[int] = set()
        self.num_changes = 0
        """How often options were set that a batch's facts follow from."""
        self._read: tuple[tuple[bytes, int] | None, Options | None] = None, None
        self._version = 0  # of what `read` reads
        self._rng = np.random.default_rng(seed)

    def _fill_padding(self, num_slots: int) -> None:
        for name in ("block_length", "sub_block_length", "max_steps", "top_p"):
            self.host[name][num_slots] = 1

    def add_request(
        self, slot: int, params: SamplingParams, prompt_len: int, constrained: bool
    ) -> RequestOptions:
        """Set the options of a request, new or resumed, from parameters that were validated.

        A seed cannot be guessed for a request that is `constrained`: it depends on text that is
        not final yet.
        """
        options = parse_options(params.extra_args, self.config)
        assert options.small_blocks is not None and options.threshold is not None
        assert params.max_tokens is not None
        lossless = options.mode != "diffusion"
        drawn = int(self._rng.integers(-(1 << 63), (1 << 63) - 1))
        length = options.draft_width if lossless else options.block_length
        rule = RULES[options.algorithm]
        # Without a number of steps an even share is one position.
        steps = options.max_steps or (length if rule.splits else NO_LIMIT)
        row = {
            "block_length": length,
            "sub_block_length": length if lossless else length // options.small_blocks,
            "max_steps": options.verify_steps if lossless else steps,
            "max_versions": num_drafts(options, self.config, self.row_limit),
            "fan_out": 0 if constrained else options.break_points,
            "last_position": min(prompt_len + params.max_tokens, self.max_model_len) - 1,
            "first_stop": prompt_len + max(params.min_tokens, 1) - 1,
            "prompt_length": prompt_len,
            "rule": list(RULES).index(options.algorithm),
            # A single step drafts by no rule, and break points are ranked by probability.
            "score": CONFIDENCE if lossless and options.verify_steps == 1 else rule.score,
            "top_k": params.top_k if params.top_k > 0 else self.config.vocab_size,
            "rng_seed": drawn if params.seed is None else params.seed,
            "max_post_steps": options.max_post_steps if rule.edits else 0,
            "threshold": self._strict(options.threshold),
            "least_chance": 0,
            "least_survival": 0,
            "editing_threshold": options.editing_threshold,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "verifies": lossless,
            "drafts": options.drafts_reading and not constrained,
            "fuses": not constrained and fits_next_block(options, self.config, self.row_limit),
            "constrained": constrained,
            "caches": options.block_cache,
            "splits": rule.splits,
            "edits": rule.edits,
        }
        for name, value in row.items():
            self.host[name][slot] = value
        self.is_auto[slot] = options.mode == "auto"
        self._note([slot])
        self.num_changes += 1
        return options

    def _note(self, slots: list[int]) -> None:
        """Options of `slots` were set on the host."""
        self._changed.update(slots)
        self._version += self._shared

    def _strict(self, threshold: float) -> np.float32:
        """The number that a probability has to exceed, where the family's rules let it be equal:
        the float32 next to it. With 1 still nothing exceeds it."""
        exact = np.float32(threshold)
        inclusive = self.config.family.inclusive and threshold < 1
        return np.nextafter(exact, np.float32(-1)) if inclusive else exact

    def set_draft_length(self, slots: np.ndarray, length: int) -> None:
        """Draft `length` tokens, the seed included, on canvases that begin from now on."""
        slots = slots[self.host["block_length"][slots] != length]
        if len(slots):
            self.host["block_length"][slots] = length
            self.host["sub_block_length"][slots] = length
            self._note(slots.tolist())
            self.num_changes += 1

    def set_limits(self, slots: np.ndarray, chance: float, survival: float) -> None:
        """Draft for break points that are at least so likely, and verify columns that are."""
        self.host["least_chance"][slots] = chance
        self.host["least_survival"][slots] = survival
        self._note(slots.tolist())

    def read(self, slots: np.ndarray, slot: Tensor) -> Options:
        """Options of the requests in `slots` [B] int64, on the device `slot`, as `upload` left
        them; most batches are the one before."""
        key = slots.tobytes(), self._version
        known, options = self._read
        if options is None or known != key:
            rows = (table[slot].unbind(1) for table in self._device)
            options = Options(*(column for columns in rows for column in columns))
            self._read = key, options
        return options

    def upload(self) -> None:
        """Bring what changed to the device, in a copy for each type of number."""
        if self._changed and not self._shared:
            slots = np.array(sorted(self._changed))
            index = async_tensor_h2d(slots, device=self._device[0].device)
            for here, there in zip(self._host, self._device, strict=True):
                there[index] = async_tensor_h2d(here[slots], device=there.device)
            self._version += 1
        self._changed.clear()
