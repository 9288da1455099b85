# SPDX-License-Identifier: Apache-2.0
"""What min_p, top_k and top_p leave of a row of tempered logits, without sorting the vocabulary.

Order and boundaries are those of vLLM's PyTorch sampler (`vllm/v1/worker/gpu/sample/sampler.py`,
`vllm/v1/sample/ops/topk_topp_sampler.py`):
    min_p keeps logits of at least the largest + ln(min_p);
    top_k keeps the k largest of those, with all that equal the k-th;
    top_p, on what is left and renormalised, keeps a token while the mass before it is below top_p.
Of equal logits at the boundary of top_p vLLM keeps as many as the mass asks for, which ones its
sort leaves open: here those of the smallest ids.

Nothing depends on a row's neighbours. For CPU tensors: sizes depend on the data, but in
`kept_weights`, which serves the rows of a small vocabulary together.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
"""Tokens that share a maximum and a sum; rows are padded with -inf to whole blocks."""
_BUCKETS, _BUCKETS_PER_NAT = 1024, 32
_LOWEST = torch.finfo(torch.float32).min


def kept_tokens(x: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Ids of the tokens that pass, ascending.

    Args:
        x: [V] float32, tempered logits, V a multiple of `BLOCK`; -inf bans a token. The largest is
            finite.
        top_k: at least 1; V or more keeps all.
        top_p: above 0; 1 keeps all.
        min_p: in [0, 1], 0 keeps all.

    Returns:
        [m] int64, at least one.
    """
    maxima = x.view(-1, BLOCK).amax(-1)
    best = maxima.max()
    floor = float(best + math.log(min_p)) if min_p > 0 else _LOWEST
    if top_k <= len(maxima):
        # As many blocks hold a token from here on, so the k largest do not lie below.
        floor = max(floor, float(maxima.topk(top_k).values[-1]))
    token, value = None, x
    if floor > _LOWEST or top_p >= 1:
        token = _at_least(x, floor)
        value = x[token]
    if top_k < len(value):
        large = _at_least(value, max(float(value.topk(top_k).values[-1]), _LOWEST))
        token, value = large if token is None else token[large], value[large]
    if top_p < 1:
        nucleus = _nucleus(value, best, top_p)
        token = nucleus if token is None else token[nucleus]
    assert token is not None
    return token


def kept_weights(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """What passes of many rows with a small vocabulary, by sorting them.

    Args:
        x: [n, V] float32, as in `kept_tokens`.
        top_k: [n] int64.
        top_p: [n] float32.
        min_p: [n] float32.

    Returns:
        [n, V] float64, over the weight of the likeliest token; 0 for tokens that do not pass.
    """
    value, token = x.sort(dim=1, descending=True, stable=True)
    best = value[:, :1]
    kth = value.gather(1, top_k.clamp(max=x.shape[1])[:, None] - 1)
    kept = value >= torch.maximum(kth, best + min_p.log()[:, None])
    weight = (value - best).exp().double().where(kept, 0)
    before = weight.cumsum(1) - weight
    passes = (before < top_p[:, None].double() * weight.sum(1, keepdim=True)) | (top_p >= 1)[
        :, None
    ]
    passes[:, 0] = True
    return torch.zeros_like(weight).scatter_(1, token, weight.where(passes, 0))


def _at_least(x: Tensor, floor: float) -> Tensor:
    """Ids of the tokens of [m] logits from `floor` on, ascending."""
    return _where(x >= floor)


def _where(mask: Tensor) -> Tensor:
    """`mask.nonzero()[:, 0]`, several times faster."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _nucleus(x: Tensor, best: Tensor, top_p: float) -> Tensor:
    """Ids of the fewest of [m] logits that have `top_p` of their mass, ascending.

    The logits are put into buckets by their distance to the best, the last one holding all that are
    far away; only the bucket in which the mass passes `top_p` is sorted.
    """
    below = best - x
    bucket = (below * _BUCKETS_PER_NAT).clamp_(max=_BUCKETS - 1).int()
    mass = torch.bincount(bucket, below.neg_().exp_().double()).cumsum(0)
    limit = top_p * float(mass[-1])
    crossing = int((mass < limit).sum())
    before = float(mass[crossing - 1]) if crossing else 0.0

    inside = x[_where(bucket == crossing)].sort(descending=True).values
    weight = (inside - best).exp().double()
    count = max(int((before + weight.cumsum(0) - weight < limit).sum()), 1)
    last = inside[count - 1]
    kept = _at_least(x, float(last))
    surplus = int((inside >= last).sum()) - count
    if surplus:
        equal = _where(x[kept] == last)
        keep = torch.ones_like(kept, dtype=torch.bool)
        keep[equal[-surplus:]] = False
        kept = kept[keep]
    return kept
