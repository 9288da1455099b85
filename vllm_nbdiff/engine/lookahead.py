# SPDX-License-Identifier: Apache-2.0
"""How many tokens and pages a schedule gives one request.

The scheduler hands them out and the worker relies on them, so both ask here. They depend on the
request's own options alone: what one request asks for, no other one is given.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm.config import VllmConfig

from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.request_options import RequestOptions

BLOCKS_PER_SCHEDULE = 2
"""Most that a request may emit in a schedule, in blocks of the model."""
# Reading the weights of a large model takes a GPU as long as computing so many rows.
_FREE_ROWS = 256
# Memory for rows of logits that drafts may take where a block of every sequence takes less.
_DRAFTED_LOGITS = 2048


def row_limit(vllm_config: VllmConfig, config: BlockDiffusionConfig) -> int:
    """Most rows that one request may have in a forward."""
    scheduler = vllm_config.scheduler_config
    limits = [scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens]
    if config.static_shapes:
        # There rows are scheduled tokens.
        limits.append(scheduler.long_prefill_token_threshold)
    return min(limit for limit in limits if limit)


def logit_rows(vllm_config: VllmConfig, config: BlockDiffusionConfig) -> int:
    """Most rows of logits of a forward with static shapes, but for guessed seeds: a block of every
    sequence and what follows it, or what drafts of fewer take."""
    scheduler = vllm_config.scheduler_config
    blocks = scheduler.max_num_seqs * (config.block_length + 1)
    return max(blocks, min(scheduler.max_num_batched_tokens, _DRAFTED_LOGITS))


class Share(NamedTuple):
    """Tokens that a schedule gives to the canvas of a request, by how many others there are."""

    least: int
    most: int

    def of(self, share: int) -> int:
        """The largest multiple of `least` within `share` and `most`, and `least` in any case."""
        return max(min(share, self.most) // self.least, 1) * self.least


def canvas_tokens(
    options: RequestOptions, config: BlockDiffusionConfig, limit: int, streams: bool = False
) -> Share:
    """Tokens that a schedule gives to the canvas of a request.

    With static shapes a schedule is one forward, and these are its rows: more than the least are
    for drafts behind break points. Otherwise they are the tokens that its forwards may emit, and
    more of them save schedules.

    Args:
        options: of the request.
        config: of the served model.
        limit: most rows of one request, from `row_limit`.
        streams: its text is sent as it is decided; a block of `diffusion`, which takes many
            forwards, does not wait for another one.
    """
    if config.static_shapes:
        width = _canvas_width(options, config)
        parts = 1 + num_drafts(options, config, limit) + fits_next_block(options, config, limit)
        known = config.family.known_rows * options.drafts_reading
        least = min(width * parts + known, limit)
        return Share(least, least * max(min(1 + options.break_points, limit // least), 1))
    if options.mode != "diffusion":
        return Share(config.block_length, BLOCKS_PER_SCHEDULE * config.block_length)
    most = options.block_length if streams else BLOCKS_PER_SCHEDULE * config.block_length
    return Share(options.block_length, most)


def canvas_budget(config: BlockDiffusionConfig, budget: int) -> int:
    """Tokens of a schedule that canvases share where they may have more than the least.

    Args:
        budget: tokens of a schedule.
    """
    return min(budget, _FREE_ROWS) if config.static_shapes else budget


def lookahead_tokens(
    options: RequestOptions, config: BlockDiffusionConfig, page_size: int, limit: int
) -> int:
    """Tokens behind those of `canvas_tokens` that need pages as well.

    They are for the next block, where it is begun in the forward that commits this one, and for
    drafts.

    Args:
        options: of the request.
        config: of the served model.
        page_size: tokens of a page.
        limit: most rows of one request, from `row_limit`.
    """
    width = _canvas_width(options, config)
    tokens = draft_room(num_drafts(options, config, limit), width, page_size)
    tokens += width * fits_next_block(options, config, limit)
    tokens += break_point_room(options.break_points, width, page_size)
    tokens += config.family.known_rows * options.drafts_reading
    if config.static_shapes:
        share = canvas_tokens(options, config, limit)
        tokens -= share.least - width
    return tokens


def num_drafts(options: RequestOptions, config: BlockDiffusionConfig, limit: int) -> int:
    """Canvases beside its own that a forward may compute for a request."""
    return min(options.num_drafts, limit // _canvas_width(options, config) - 1)


def fits_next_block(options: RequestOptions, config: BlockDiffusionConfig, limit: int) -> bool:
    """Whether a forward may commit a block of the request and begin the next one."""
    width = _canvas_width(options, config)
    return options.fused_commit and 1 < width <= limit // 2


def draft_room(num_drafts: int, width: int, page_size: int) -> int:
    """Tokens whose pages hold so many drafts of a canvas of `width` tokens, wherever it starts."""
    return num_drafts * ((width + 2 * page_size - 2) // page_size) * page_size


def break_point_room(count: int, width: int, page_size: int) -> int:
    """Tokens whose pages hold the canvas behind a text of `width` tokens, and canvases behind
    `count` of its break points unless some cross a page's end: those that do not fit are left
    out."""
    return count and width + (1 + count * -(-width // page_size)) * page_size


def _canvas_width(options: RequestOptions, config: BlockDiffusionConfig) -> int:
    """Tokens of the widest canvas of a request."""
    if options.mode == "auto":
        return config.block_length
    return options.block_length if options.mode == "diffusion" else options.draft_width
