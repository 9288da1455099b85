# SPDX-License-Identifier: Apache-2.0
"""Forward process of masked block diffusion: each block gets its own share of mask tokens."""

from dataclasses import dataclass

import torch

MIN_LEVEL = 1e-3
"""Lower end of the noise level t, which bounds the weight 1/t."""


@dataclass(frozen=True)
class Noised:
    """A noised answer; all tensors are ``[rows, length]``.

    Attributes:
        ids: int64, the answer with mask tokens.
        masked: bool, where a mask token stands.
        level: float32, the noise level t of the position's block.
    """

    ids: torch.Tensor
    masked: torch.Tensor
    level: torch.Tensor


def noise_blocks(
    answer: torch.Tensor,
    block_length: int,
    mask_token_id: int,
    generator: torch.Generator | None = None,
    position_bias: float = 0.0,
    known: torch.Tensor | None = None,
    draft_share: float = 0.0,
    fan_out_share: float = 0.0,
) -> Noised:
    """Mask a share t of each block, t ~ U[0, 1]; later positions more often, if asked.

    The number of masks of a block is binomial with probability t. Which positions they fall on is
    drawn without replacement with weights ``exp(position_bias * (1 - t) * x)``, x in [0, 1] being
    the place in the block: 0 is independent masking of every token, a positive bias resembles the
    states of decoding, where the left of a block is filled first (position-dependent masking,
    after Efficient-DLM, arXiv 2512.14067).

    The first token of a block stays: in decoding it is the seed, known before the first denoise
    step. A canvas of `nbdiff_fan_out` begins before it is known, and a causal row predicts it there
    as well: it may be a mask (``fan_out_share``), but is no target.

    Args:
        answer: ``[rows, length]`` int64; the block grid starts at column 0.
        block_length: Tokens of a block.
        mask_token_id: Id written over a masked token.
        generator: Source of randomness, on the CPU; torch's default one if None.
        position_bias: Strength of the preference for later positions.
        known: ``[rows]`` int64, so many tokens at the beginning of each row stay; none if None.
        draft_share: Share of the blocks that are masked whole, t = 1, as a draft of mode ``verify``
            begins.
        fan_out_share: Share of those whose first token is a mask too, as of a draft behind a break
            point of a text that the same forward verifies.
    """
    rows, length = answer.shape
    blocks = -(-length // block_length)
    shape = (rows, blocks, block_length)
    level = torch.rand(rows, blocks, 1, generator=generator).clamp_min(MIN_LEVEL)
    if draft_share > 0:
        whole = torch.rand(rows, blocks, 1, generator=generator) < draft_share
        level = level.masked_fill(whole, 1.0)
    unseen = torch.zeros_like(level, dtype=torch.bool)
    if fan_out_share > 0:
        chosen = torch.rand(rows, blocks, 1, generator=generator) < fan_out_share
        unseen = (level == 1) & chosen

    place = torch.arange(block_length)
    column = torch.arange(blocks * block_length).view(blocks, block_length)
    own = (column < length).expand(shape)
    if known is not None:
        own = own & (column >= known.cpu()[:, None, None])
    may = own & (place > 0)
    count = ((torch.rand(shape, generator=generator) < level) & may).sum(dim=-1, keepdim=True)
    # Gumbel noise on log weights: the largest keys are draws without replacement.
    gumbel = -torch.empty(shape).exponential_(generator=generator).log()
    key = gumbel + position_bias * (1 - level) * place / max(1, block_length - 1)
    order = key.masked_fill(~may, -torch.inf).argsort(dim=-1, descending=True)
    masked = torch.zeros(shape, dtype=torch.bool).scatter(-1, order, place < count)

    hidden = masked | (unseen & own & (place == 0))
    masked, hidden, level = (
        x.expand(shape).reshape(rows, -1)[:, :length].to(answer.device)
        for x in (masked, hidden, level)
    )
    return Noised(answer.masked_fill(hidden, mask_token_id), masked, level)
