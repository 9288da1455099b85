# SPDX-License-Identifier: Apache-2.0
"""Step maps: which denoise step filled a position of a block.

A position that no step filled, a seed or a token that is forced, has NO_STEP: it stood there before
the first one. Where positions are edited the last change counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_nbdiff.decoding.canvas import Canvas
from vllm_nbdiff.decoding.plan import Plan

NO_STEP = -1


def filled_now(
    plan: Plan, state: Canvas, looked: Tensor, level: Tensor | None, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """What a forward did to the columns of the canvases that requests have after it.

    Args:
        plan: of the forward.
        state: after it.
        looked: [B] bool, canvases that were denoised.
        level: [B] int64, the version of the canvas that was gone on from; None: the canvas.

    Returns:
        [B, L] int64, the steps done before the one that filled a column, NO_STEP of a canvas that
        begins; and [B, L] bool, where that is new.
    """
    step, canvas = plan.step[:, None], plan.canvases.tokens
    if level is not None:
        # A column that is masked in the n-th version was filled after the step it stands for.
        versions = torch.arange(1, canvas.shape[1], device=level.device)
        right = (versions <= level[:, None])[:, :, None]
        step = step + ((canvas[:, 1:] == mask_token_id) & right).sum(1)
    filled = looked[:, None] & (state.tokens != canvas[:, 0])
    return torch.where(filled, step, NO_STEP), filled | plan.reads[:, None]
