# SPDX-License-Identifier: Apache-2.0
"""Arithmetic over rows of a vocabulary, taken block by block.

A sum's order is then fixed: no thread count and no number of neighbours changes a row's result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_nbdiff.decoding.filters import BLOCK

_LOWEST = torch.finfo(torch.float32).min


def padded(logits: Tensor) -> Tensor:
    """A float32 copy [n, blocks, BLOCK] of [n, V] logits, -inf past the end."""
    n, vocab_size = logits.shape
    blocks = -(-vocab_size // BLOCK)
    x = torch.empty(n, blocks * BLOCK)
    x[:, :vocab_size] = logits
    x[:, vocab_size:] = -torch.inf
    return x.view(n, blocks, BLOCK)


def likeliest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first largest logit of each row of [n, blocks, BLOCK]: id (0 if not finite), value."""
    maxima = x.amax(-1)
    top, block = maxima.amax(-1), maxima.argmax(-1)
    lane = x[torch.arange(len(x)), block].argmax(-1)
    return (block * BLOCK + lane).where(top.isfinite(), 0), top


def runner_up(x: Tensor) -> Tensor:
    """The second largest logit of each row of [n, blocks, BLOCK], equal to the largest on a tie."""
    maxima = x.amax(-1)
    inside = x[torch.arange(len(x)), maxima.argmax(-1)].topk(2).values[:, 1]
    if maxima.shape[1] == 1:
        return inside
    return torch.maximum(maxima.topk(2).values[:, 1], inside)


def probability_of(p: Tensor, token: Tensor) -> Tensor:
    """Probability [n] of each token [n] in rows p [n, V]."""
    return p.gather(1, token[:, None])[:, 0]


def negative_entropy(x: Tensor, top: Tensor, p: Tensor) -> Tensor:
    """Sum [n] of p ln p over rows x [n, blocks, BLOCK] of largest logit `top` [n]."""
    below = (x - top[:, None, None]).clamp_(_LOWEST)  # -inf has no share in the sum
    mean = below.mul_(p.view_as(x)).sum(-1).double().sum(-1)
    return (mean + p.amax(-1).log()).float()


def invert_blocks(p: Tensor, draw: Tensor) -> Tensor:
    """Tokens [n] at which the CDFs of rows p [n, blocks, BLOCK] pass the draws [n].

    The block first, then the token by where the draw lies in its block: a block's sum in float32
    moves all its tokens' probabilities by the same few 1e-7, the rarest too.
    """
    block, rest = invert(p.sum(-1).double(), draw)
    lane, _ = invert(p[torch.arange(len(p)), block].double(), rest)
    return block * BLOCK + lane


def invert(weight: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Indices at which the sums of `weight` [..., m] float64 pass `draw` [...] of their totals, and
    where in [0, 1] of their steps. An index has positive weight if any has."""
    cdf = weight.cumsum(-1)
    total = cdf[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(draw[..., None] * total, below)
    index = torch.searchsorted(cdf, target, right=True).clamp_(max=weight.shape[-1] - 1)
    step = weight.gather(-1, index)
    rest = (target - cdf.gather(-1, index) + step) / step
    return index[..., 0], rest[..., 0].clamp(0, 1)
