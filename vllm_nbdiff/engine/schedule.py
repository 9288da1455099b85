# SPDX-License-Identifier: Apache-2.0
"""What the runner scheduled, as decoding sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_nbdiff.decoding.canvas import NO_LIMIT, CanvasTable
from vllm_nbdiff.decoding.plan import Batch, Facts
from vllm_nbdiff.decoding.sampling import Asked
from vllm_nbdiff.engine.options import OptionTable

_FACTS = (
    *("max_steps", "verifies", "fuses", "caches", "max_versions", "fan_out", "rule", "drafts"),
    *("block_length", "sub_block_length", "splits", "edits"),
)

_CHEAP_ROWS = 128  # of a forward, which more than that slow down for everybody


@dataclass(frozen=True)
class Schedule:
    """The scheduled requests, B of them, on the host and on the model's device."""

    slots: np.ndarray  # [B] int64
    decodes: np.ndarray  # [B] bool, a canvas is scheduled
    scheduled: np.ndarray  # [B] int64, tokens of the prompt, or that a decode may emit
    longest: int  # no request has more tokens
    scores_prompt: bool  # some want log-probabilities of the prompts that are scheduled
    batch: Batch
    facts: Facts
    asked: Asked


@dataclass
class ScheduleReader:
    """Reads the batches of the runner.

    Attributes:
        options: of all requests.
        table: their canvases.
        text: [slots, T] int32 on the model's device, tokens of every request.
        lookahead: [slots] int64, tokens behind the scheduled ones that have pages.
        static: a forward has exactly the rows that are scheduled.
        max_rows: rows that a forward may have, with static shapes rows of logits.
        device: of the model.
    """

    options: OptionTable
    table: CanvasTable
    text: torch.Tensor
    lookahead: np.ndarray
    static: bool
    max_rows: int
    device: torch.device

    def __post_init__(self) -> None:
        self.scores_prompt = np.zeros(len(self.lookahead), np.bool_)
        """[slots] bool, requests that want log-probabilities of their prompts."""
        self._known: tuple[Any, ...] = ()
        """What `_facts` and `_asked` gave last, behind what they were asked for."""

    def read(
        self, runner: InputBatch, page_size: int, most_segments: int | None = None
    ) -> Schedule:
        """What `runner` holds.

        Args:
            page_size: in tokens.
            most_segments: that a request may have, where a captured graph runs; None: any number.
        """
        count = runner.num_reqs
        slots = runner.idx_mapping_np[:count].astype(np.int64)
        scheduled = runner.num_scheduled_tokens[:count].astype(np.int64)
        assert runner.num_draft_tokens_per_req is not None
        decodes = runner.num_draft_tokens_per_req[:count] > 0
        computed = runner.num_computed_prefill_tokens_np[:count].astype(np.int64)
        ends = ~decodes & (computed + scheduled >= runner.prefill_len_np[:count])
        rows = scheduled
        if self.static:
            # Logits are padded to the request with the most rows: it may not cost all others many.
            cap = max(self.max_rows // count, self.options.config.block_length + 1)
            rows = np.where(decodes, np.minimum(scheduled, cap), scheduled)
        else:
            known = self.options.config.family.known_rows * self.options.host["drafts"][slots]
            rows = scheduled + known + self._extra_rows(slots, int(scheduled.sum()))
        columns = [slots, scheduled, computed, rows, self.lookahead[slots], decodes, ends]
        on_device = async_tensor_h2d(np.stack(columns), device=self.device).unbind()
        slot, given, done, own_rows, behind, decoding, ending = on_device
        room = self.table.start(slot) + given + behind
        blocks, tail = 1, None
        if self.options.config.family.block_causal and not decodes.all():
            blocks = max(int(scheduled[~decodes].max()) // self.options.config.block_length, 1)
            tail = self._tail(slot, done + given)
        # Most batches are the one before.
        # With static shapes no request has more rows than are scheduled for it.
        most = rows * decodes
        if not self.static:
            # Others would see changes in each schedule of what they need not ask.
            versions = self.options.host["max_versions"][slots] > 0
            most = np.where(versions, rows, self.max_rows)
        arrays = tuple(own.tobytes() for own in (slots, decodes, most))
        key = (*arrays, blocks, page_size, most_segments, self.options.num_changes)
        if self._known[:1] != (key,):
            facts = self._facts(slots, decodes, most, blocks, page_size, most_segments)
            self._known = key, facts, self._asked(slots)
        _, facts, asked = self._known
        return Schedule(
            slots=slots,
            decodes=decodes,
            scheduled=scheduled,
            scores_prompt=bool((self.scores_prompt[slots] & ~decodes).any()),
            longest=int((runner.num_computed_tokens_np[:count] + scheduled).max()),
            batch=Batch(
                slot=slot,
                decodes=decoding != 0,
                scheduled=given,
                computed=done,
                prompt_ends=ending != 0,
                room=room.clamp(max=self.options.max_model_len),
                max_rows=own_rows,
                tail=tail,
            ),
            facts=facts,
            asked=asked,
        )

    def _tail(self, slot: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """[B, L] int64: tokens of the requests in `slot` [B] from the block on that position `end`
        [B] lies in."""
        columns = self.table.columns
        place = (end // len(columns) * len(columns))[:, None] + columns
        return self.text[slot[:, None], place.clamp(max=self.text.shape[1] - 1)].long()

    def _extra_rows(self, slots: np.ndarray, scheduled: int) -> int:
        """Rows that each request in `slots` [B] that uses more than are scheduled may add.

        Equal shares of what is left of the budget; beside requests that use none, of what costs
        them little, or a block.
        """
        host = self.options.host
        more = (host["max_versions"][slots] > 0) | (host["fan_out"][slots] > 0)
        users = int(np.count_nonzero(more | host["fuses"][slots]))
        if not users:
            return 0
        share = (self.max_rows - scheduled) // users
        if users == len(slots):
            return share
        cheap = max(_CHEAP_ROWS - scheduled, scheduled // 32)
        return min(share, max(cheap // users, self.options.config.block_length))

    def _asked(self, slots: np.ndarray) -> Asked:
        host = self.options.host
        asked = Asked.by(
            temperature=host["temperature"][slots],
            top_p=host["top_p"][slots],
            top_k=host["top_k"][slots],
            min_p=host["min_p"][slots],
            algorithm=host["score"][slots],
            vocab_size=self.options.config.vocab_size,
        )
        # A draft that is made in one step, with none for its break points, is what it is.
        plain = host["verifies"][slots] & (host["max_steps"][slots] == 1)
        plain &= (host["fan_out"][slots] == 0) & ~host["constrained"][slots]
        return asked._replace(chances=not plain.all())

    def _facts(
        self,
        slots: np.ndarray,
        decodes: np.ndarray,
        most_rows: np.ndarray,
        blocks: int,
        page_size: int,
        most_segments: int | None,
    ) -> Facts:
        config = self.options.config
        host = {name: self.options.host[name][slots] for name in _FACTS}
        # Canvases of `auto` may still be as wide as a length chosen before.
        auto, longest = self.options.is_auto[slots], config.block_length
        for name in ("block_length", "sub_block_length"):
            host[name] = np.where(auto, longest, host[name])
        if most_segments is not None:
            # Behind a text one canvas, versions of it, or those of break points.
            host["fuses"] = host["fuses"] & (most_segments > 1)
            host["max_versions"] = np.minimum(host["max_versions"], max(most_segments - 2, 0))
            host["drafts"] = host["drafts"] & (most_segments > 1)
            host["fan_out"] = np.minimum(host["fan_out"], most_segments - 1)
        length = np.maximum(host["block_length"], 1)
        others = np.maximum(most_rows // length - 1, 0)
        if not self.static:
            # What a step proposes is kept for the next one, which may have more rows.
            others = np.maximum(others, 1)
        host["max_versions"] = np.minimum(host["max_versions"], others)
        if self.static:
            each = np.maximum(length - 1, 1)
            host["fan_out"] = np.minimum(host["fan_out"], np.maximum(most_rows // each, 1))
            host["fuses"] = host["fuses"] & (others > 0)
        # A single token that is exact is no mask, unless that is what stands for no token.
        exact = config.family.seed == "always" and not config.family.block_causal
        exact &= config.mask_token_id > 0
        single = exact & host["verifies"] & (host["block_length"] == 1)
        limited = host["max_steps"] < NO_LIMIT
        verifies, fuses, versions = host["verifies"], host["fuses"], host["max_versions"]
        next_rows = np.where(verifies & decodes, host["block_length"], 1)
        fill_rows = np.where(
            limited | host["edits"], host["block_length"], host["sub_block_length"]
        )
        fill_rows = np.where(decodes, fill_rows * (1 + versions), 0)
        most = np.where(fuses, next_rows + fill_rows + 1, np.maximum(next_rows, fill_rows))
        drafted = next_rows + host["fan_out"] * (host["block_length"] - 1)
        most = np.where(host["fan_out"] * decodes > 0, np.minimum(drafted, most_rows), most)
        return Facts(
            mask_token_id=config.mask_token_id,
            max_model_len=self.options.max_model_len,
            page_size=page_size,
            rules=tuple(sorted(set(host["rule"].tolist()))),
            static=self.static,
            prefills=not decodes.all(),
            verifies=bool(verifies.any()),
            fuses=bool(fuses.any()),
            caches=bool(host["caches"].any()),
            limits=bool(limited.any()),
            versions=int(versions.max()),
            drafts=bool((host["drafts"] & decodes).any()),
            fan_out=int((host["fan_out"] * decodes).max()),
            denoises=not (decodes.any() and (host["drafts"] | single)[decodes].all()),
            rows=int(most.max()),
            family=config.family,
            blocks=blocks,
            splits=bool(host["splits"].any()),
            edits=bool(host["edits"].any()),
        )
