# SPDX-License-Identifier: Apache-2.0
"""L = L_MDM + 0.5 * L_AR on the input [noised ; clean] (NBDiff, arXiv 2512.06776)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel

from vllm_nbdiff.adapt.data import Batch
from vllm_nbdiff.adapt.mask import attention_mask, block_numbers, training_mask
from vllm_nbdiff.adapt.noise import noise_blocks
from vllm_nbdiff.families.family import ContextMask

Weighting = Literal["uniform", "inverse_t", "acceptance"]
CERTAINTY_TEMPERATURE = 0.5
"""Softmax temperature of the certainty loss (dParallel)."""


@dataclass(frozen=True)
class LossOptions:
    """What is trained.

    Args:
        ar_weight: Factor of the next-token loss on the clean half.
        ar_targets: ``all`` tokens of an answer, or only the ``seeds``, the first tokens of blocks,
            without which no block can be decoded: training "without AR loss".
        eos_padding_weight: Factor of the masked loss after an answer's eos, in its last block;
            later blocks, which decoding never reaches, have none.
        weighting: Weight of a masked token: ``uniform``, ``inverse_t`` for the 1/t of the
            likelihood bound, or ``acceptance``, see :func:`acceptance_weights`.
        position_bias: See :func:`~vllm_nbdiff.adapt.noise.noise_blocks`.
        draft_share, fan_out_share: The same.
        certainty_weight: Factor of the entropy of right guesses at masked positions
            (certainty-forcing of dParallel, arXiv 2509.26488): surer guesses pass a threshold
            sooner, which buys tokens per forward.
        context: How clean text sees itself. ``block-causal`` (the usual block diffusion) has a
            next-token loss at the seeds only, since other rows see their target, and is for batches
            of :func:`~vllm_nbdiff.adapt.data.cut_at_block`.
    """

    ar_weight: float = 0.5
    ar_targets: Literal["all", "seeds"] = "all"
    eos_padding_weight: float = 0.1
    weighting: Weighting = "uniform"
    position_bias: float = 0.0
    draft_share: float = 0.0
    fan_out_share: float = 0.0
    certainty_weight: float = 0.0
    context: ContextMask = "causal"

    def __post_init__(self) -> None:
        for name in ("ar_weight", "eos_padding_weight", "certainty_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.weighting not in get_args(Weighting):
            raise ValueError(
                f"weighting must be one of {', '.join(get_args(Weighting))}, got {self.weighting!r}"
            )
        for name in ("draft_share", "fan_out_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.fan_out_share > 0 and self.draft_share == 0:
            raise ValueError("fan_out_share is a share of draft_share, which is 0")
        if self.context not in get_args(ContextMask):
            raise ValueError(f"context must be causal or block-causal, got {self.context!r}")
        if self.context == "block-causal" and self.ar_targets != "seeds":
            raise ValueError(
                "context 'block-causal' needs ar_targets='seeds': other rows see their target"
            )
        if self.context == "block-causal" and self.ar_weight == 0:
            raise ValueError(
                "context 'block-causal' needs a positive ar_weight: seeds have no other loss"
            )


@dataclass(frozen=True)
class Losses:
    """0-d float32 losses, each a weighted mean over its own targets (0 without targets)."""

    total: torch.Tensor
    masked: torch.Tensor
    ar: torch.Tensor
    certainty: torch.Tensor


def _weighted_mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (values * weight).sum() / weight.sum().clamp_min(1e-9)


def _forward(
    model: PreTrainedModel,
    batch: Batch,
    noised: torch.Tensor,
    block_length: int,
    context: ContextMask = "causal",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict answer tokens: of the noised half and of the clean half.

    Goes through the model's own ``forward``, which data-parallel wrappers hook.

    Returns:
        ``[rows, noised columns - 1, vocab]`` for tokens 1 and on, ``[rows, answer columns, vocab]``
        for tokens 0 and on (the first one is predicted by the last row of the prompt; where no
        prompt comes before it, it is of the prompt's tail and its logits mean nothing).
    """
    clean, padding = batch["input_ids"], batch["prompt_padding"]
    (rows, length), num_noised = clean.shape, noised.shape[1]
    num_answer = int(batch["answer_columns"])
    block = block_numbers(length - num_answer, num_answer, block_length, padding)
    sees = training_mask(block, num_noised, context)
    column = torch.arange(num_noised + length, device=clean.device)
    position = (column[:length] - padding[:, None]).clamp_min(0)
    own = extract_model_from_parallel(model)
    own.noised_columns = num_noised  # for what acts on these alone
    implementation = own.config._attn_implementation
    last_noised = max(0, num_noised - 1)
    logits = model(
        input_ids=torch.cat([noised, clean], dim=1),
        attention_mask=attention_mask(sees, rows, len(column), clean.device, implementation),
        position_ids=torch.cat([position[:, length - num_noised :], position], dim=1),
        use_cache=False,
        logits_to_keep=torch.cat([column[:last_noised], column[-num_answer - 1 : -1]]),
    ).logits
    return logits[:, :last_noised], logits[:, last_noised:]


def ar_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Next-token loss (0-d float32) on the answers up to their eos; no noised half."""
    _, logits = _forward(model, batch, batch["input_ids"][:, :0], 1)
    return _clean_loss(logits, batch, 1)


def _clean_loss(logits: torch.Tensor, batch: Batch, every: int) -> torch.Tensor:
    """Next-token loss on every ``every``-th token of the answers; there may be none."""
    num_answer = int(batch["answer_columns"])
    answer = batch["input_ids"][:, -num_answer:]
    column = torch.arange(num_answer, device=answer.device)
    chosen = (column < batch["answer_length"][:, None]) & (column % every == 0)
    chosen &= column >= batch["tail_length"][:, None]
    total = F.cross_entropy(logits[chosen].float(), answer[chosen], reduction="sum")
    return total / chosen.sum().clamp_min(1)


def _masked_weights(
    batch: Batch, masked: torch.Tensor, level: torch.Tensor, block_length: int, options: LossOptions
) -> torch.Tensor:
    """Weights ``[rows, answer columns]`` float32 of the masked loss."""
    column = torch.arange(masked.shape[1], device=masked.device)
    length = batch["answer_length"][:, None]
    weight = masked.float()
    if options.weighting == "inverse_t":
        weight = weight / level
    weight = torch.where(column >= length, weight * options.eos_padding_weight, weight)
    unreached = column // block_length > (length - 1) // block_length
    return weight.masked_fill(unreached, 0.0)


def acceptance_weights(
    probability: torch.Tensor, weight: torch.Tensor, block_length: int
) -> torch.Tensor:
    """Weights of targets by what their probability adds to the expected length that is accepted.

    Of a block whose guesses hold with ``q_1, q_2, ...`` so many hold from the left as the sum over
    ``k`` of ``q_1 ... q_k``; by ``log q_j`` that grows with the sum over ``k >= j``. Each ``q`` is
    half its value and half 1, which keeps weights on the right alive while the left is still
    wrong (D-PACE, arXiv 2605.18810, section 3: alpha = 0.5).

    Args:
        probability: ``[rows, columns]`` float32 of the targets; without gradient.
        weight: ``[rows, columns]`` float32, what each target counts in that length; 0: it is none.
        block_length: The grid of blocks starts at column 0.

    Returns:
        ``[rows, columns]`` float32.
    """
    rows, columns = probability.shape
    beyond = -columns % block_length
    weight = F.pad(weight, (0, beyond)).view(rows, -1, block_length)
    held = F.pad(probability, (0, beyond)).view(rows, -1, block_length)
    reached = torch.where(weight > 0, (1 + held) / 2, 1).cumprod(-1) * weight
    reached = reached.flip(-1).cumsum(-1).flip(-1)
    return (reached * (weight > 0)).view(rows, -1)[:, :columns]


def _certainty(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats of the guesses that are right."""
    sharp = (logits / CERTAINTY_TEMPERATURE).log_softmax(dim=-1)
    entropy = -(sharp.exp() * sharp).sum(dim=-1)
    return _weighted_mean(entropy, weight * (logits.argmax(dim=-1) == target))


def adaptation_loss(
    model: PreTrainedModel,
    batch: Batch,
    block_length: int,
    mask_token_id: int,
    options: LossOptions,
    generator: torch.Generator | None = None,
) -> Losses:
    """Masked-diffusion loss of the noised answers plus next-token loss of the clean ones.

    The logits keep the shift of the AR model: noised row i predicts token i + 1 of its own block,
    so the first token of a block is a target of the AR loss only. Prompts are never noised.
    """
    num_answer = int(batch["answer_columns"])
    answer = batch["input_ids"][:, -num_answer:]
    noised = noise_blocks(
        answer,
        block_length,
        mask_token_id,
        generator,
        options.position_bias,
        known=batch["tail_length"],
        draft_share=options.draft_share,
        fan_out_share=options.fan_out_share,
    )
    by_noised, by_clean = _forward(model, batch, noised.ids, block_length, options.context)

    weight = _masked_weights(batch, noised.masked, noised.level, block_length, options)[:, 1:]
    chosen = weight > 0
    logits, target, kept = by_noised[chosen].float(), answer[:, 1:][chosen], weight[chosen]
    missed = F.cross_entropy(logits, target, reduction="none")
    if options.weighting == "acceptance":
        held = torch.zeros_like(weight)
        held[chosen] = missed.detach().neg().exp()
        # Columns 1 and on; the grid begins at column 0.
        held, weight = F.pad(held, (1, 0)), F.pad(weight, (1, 0))
        kept = acceptance_weights(held, weight, block_length)[:, 1:][chosen]
    masked = _weighted_mean(missed, kept)
    ar = _clean_loss(by_clean, batch, block_length if options.ar_targets == "seeds" else 1)
    total = masked + options.ar_weight * ar
    certainty = torch.zeros_like(masked)
    if options.certainty_weight > 0:
        certainty = _certainty(logits, target, kept)
        total = total + options.certainty_weight * certainty
    return Losses(total, masked, ar, certainty)
