# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of chosen tokens and of the likeliest ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_nbdiff.decoding.filters import kept_weights
from vllm_nbdiff.decoding.plan import Plan
from vllm_nbdiff.decoding.sampling import RowParams


class Scores(NamedTuple):
    """Of n rows: the chosen token's first, then those of the k likeliest, in order, or of k that
    were named."""

    token: Tensor  # [n, k + 1] int64
    value: Tensor  # [n, k + 1] float32, in nats
    rank: Tensor  # [n] int64, tokens at least as likely as the chosen one


def score(
    logits: Tensor, token: Tensor, k: int, normalized: bool = True, named: Tensor | None = None
) -> Scores:
    """Scores of `token` [n] int64 and the k likeliest tokens under `logits` [n, V] float32.

    Args:
        normalized: log-probabilities; else the logits themselves.
        named: [n, k] int64, tokens that take the place of the likeliest ones; -1: none does.
    """
    ids = token[:, None]
    chosen = logits.gather(1, ids)
    rank = (logits >= chosen).sum(1)
    if k:
        # More may be named, some of them twice, than there are.
        likeliest = logits.topk(min(k, logits.shape[1])).indices
        others = pad(likeliest, (0, k - likeliest.shape[1]))
        if named is not None:
            others = torch.where(named >= 0, named, others)
        ids = torch.cat([ids, others], dim=1)
    value = logits.gather(1, ids)
    if normalized:
        value = value - logits.logsumexp(1, keepdim=True)
    return Scores(ids, value, rank)


def process(logits: Tensor, params: RowParams | None, mask_token_id: int) -> Tensor:
    """What rows [n, V] float32 of constrained logits are drawn from, as logits.

    Tempered, and -inf where a filter or the ban of the mask token leaves nothing, as vLLM's sampler
    leaves them for its processed modes; greedy rows stay as they are.

    Args:
        params: of the n rows; None: all are greedy.
    """
    if params is None or not params.asked.sampled:
        return logits
    sampled = (params.temperature > 0)[:, None]
    tempered = logits / params.temperature.where(params.temperature > 0, 1)[:, None]
    tempered[:, mask_token_id] = -torch.inf
    if params.asked.filters:
        top_k = params.top_k.clamp(max=logits.shape[1])
        kept = kept_weights(tempered, top_k, params.top_p, params.min_p) > 0
        tempered = tempered.where(kept, -torch.inf)
    return torch.where(sampled, tempered, logits)


class Filled(NamedTuple):
    """What a denoise step filled, [B, L] each."""

    token: Tensor  # int64
    accepted: Tensor  # bool, columns that it filled
    level: Tensor | None  # [B] int64, the version of the canvas it went on from; None: the canvas


def decided(plan: Plan, token: Tensor, filled: Filled | None) -> tuple[Tensor, Tensor]:
    """Which tokens the rows of a forward decided, [B, K] int64, and whether they did, [B, K] bool.

    Args:
        plan: of the forward.
        token: [B, K] int64, drawn for each row.
        filled: None: no canvas was denoised.
    """
    first, num_canvases = plan.num_next, plan.canvases.tokens.shape[1]
    last = plan.end_of_fill
    used = plan.rows.needed.clone()
    used[:, first:] = False  # a seed that was guessed is drawn again when its block is committed
    if filled is None:
        return token, used
    taken, chosen = torch.zeros_like(plan.canvases.active), torch.zeros_like(plan.canvases.tokens)
    level: int | Tensor = 0
    if filled.level is not None:
        # What a version was right about, the canvas one position less full decided.
        below = torch.arange(num_canvases - 1, device=token.device) < filled.level[:, None]
        taken[:, :-1] = (plan.canvases.tokens[:, :-1] != plan.canvases.tokens[:, 1:]) & below[
            :, :, None
        ]
        chosen[:, :-1] = plan.canvases.tokens[:, 1:]
        level = filled.level
    requests = torch.arange(len(token), device=token.device)
    taken[requests, level] = filled.accepted
    chosen[requests, level] = filled.token
    used[:, first:last] = taken.flatten(1)
    token = torch.cat([token[:, :first], chosen.flatten(1), token[:, last:]], dim=1)
    return token, used
