# SPDX-License-Identifier: Apache-2.0
"""Decoding of NBDiff and of Fast-dLLM v2 with plain transformers: one request, KV cache, no vLLM.

Written for obviousness, as the yardstick of the engine. Semantics of ``generation_utils.py`` of
YuchuanTian/NBDiff (arXiv 2512.06776) at batch 1, with two corrections. ``margin`` compares the two
best tokens of a position. The mask token is never generated: it is no seed and no random draw, a
greedy position that names it stays masked as in the original, and a step in which all do so, which
the original would repeat for ever, fills the likeliest position with its best other token.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel

Algorithm = Literal["confidence", "entropy", "margin"]


@dataclass(frozen=True)
class Step:
    """One denoise step: which positions of which block were filled with which tokens.

    ``confidence`` is what the algorithm ranks by, ``probability`` what the threshold compares.
    """

    block: int
    positions: list[int]
    token_ids: list[int]
    confidence: list[float]
    probability: list[float]


@dataclass(frozen=True)
class Generation:
    """New tokens, up to and including the first eos, and what they cost.

    ``forwards`` counts every model forward: prefill, denoise steps and commits.
    """

    token_ids: list[int]
    forwards: int
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn from logits; ``temperature`` 0 is argmax and ignores the filters."""

    mask_token_id: int | None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Distribution that confidences come from; ``logits`` ``[vocab]``, result float32."""
        logits = logits.float()
        if self.temperature > 0:
            logits = self.without_mask(logits) / self.temperature
            if self.top_k is not None:
                logits = keep_top_k(logits, self.top_k)
            if self.top_p is not None:
                logits = keep_top_p(logits, self.top_p)
        return logits.softmax(dim=-1)

    def draw(self, probabilities: torch.Tensor) -> int:
        """One token id from ``probabilities`` ``[vocab]``; a greedy one may be the mask token."""
        if self.temperature == 0:
            return int(probabilities.argmax())
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def draw_text(self, logits: torch.Tensor) -> int:
        """One token id from ``logits`` ``[vocab]``, never the mask token."""
        return self.draw(self.probabilities(self.without_mask(logits)))

    def without_mask(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` ``[..., vocab]`` with -inf for the mask token."""
        if self.mask_token_id is None:
            return logits
        logits = logits.clone()
        logits[..., self.mask_token_id] = -torch.inf
        return logits


def keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """-inf outside the smallest set of best tokens whose probability reaches ``top_p``."""
    best_first, order = logits.sort(descending=True)
    mass = best_first.softmax(dim=-1).cumsum(dim=-1)
    dropped = order[1:][mass[:-1] > top_p]
    return logits.index_fill(0, dropped, -torch.inf)


def keep_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """-inf for every token worse than the ``top_k``-th best."""
    worst_kept = logits.topk(min(top_k, len(logits))).values[-1]
    return logits.masked_fill(logits < worst_kept, -torch.inf)


def confidence_of(probabilities: torch.Tensor, token_id: int, algorithm: Algorithm) -> float:
    """What ``algorithm`` ranks positions by; larger is filled sooner."""
    if algorithm == "confidence":
        return float(probabilities[token_id])
    if algorithm == "entropy":
        return float((probabilities * (probabilities + 1e-10).log()).sum())
    if algorithm == "margin":
        best, second = probabilities.topk(2).values
        return float(best - second)
    raise ValueError(f"algorithm must be confidence, entropy or margin, got {algorithm!r}")


class Context:
    """A model with the KV cache of its finished text.

    ``block_causal`` finishes text with every appended block seeing all of itself, as other block
    diffusion models do and NBDiff does not.
    """

    def __init__(self, model: PreTrainedModel, block_causal: bool = False) -> None:
        self.model = model
        self.block_causal = block_causal
        self.cache = DynamicCache()
        self.forwards = 0

    def _forward(self, token_ids: Sequence[int], mask: torch.Tensor) -> torch.Tensor:
        start = self.cache.get_seq_length()
        self.forwards += 1
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor([list(token_ids)]),
                attention_mask=mask[None, None],
                position_ids=torch.arange(start, start + len(token_ids))[None],
                past_key_values=self.cache,
                use_cache=True,
            )
        return output.logits[0]

    def append(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Forward whose KV is kept; logits ``[vocab]`` after the last token."""
        start, rows = self.cache.get_seq_length(), len(token_ids)
        mask = torch.ones(rows, start + rows, dtype=torch.bool)
        if not self.block_causal:
            mask = mask.tril(diagonal=start)
        return self._forward(token_ids, mask)[-1]

    def look(self, canvas: Sequence[int]) -> torch.Tensor:
        """Bidirectional forward of the canvas, KV dropped; logits ``[canvas, vocab]``."""
        start, rows = self.cache.get_seq_length(), len(canvas)
        logits = self._forward(canvas, torch.ones(rows, start + rows, dtype=torch.bool))
        self.cache.crop(-rows)
        return logits


def denoise_step(
    context: Context,
    canvas: list[int],
    masked: Sequence[int],
    block: int,
    algorithm: Algorithm,
    threshold: float,
    sampling: Sampling,
) -> Step:
    """Fill, in place, the most confident of the ``masked`` positions of ``canvas`` and all others
    whose token has a probability above ``threshold``."""
    logits = context.look(canvas)
    rows = [sampling.probabilities(logits[position - 1]) for position in masked]
    tokens = [sampling.draw(row) for row in rows]
    pairs = list(zip(rows, tokens, strict=True))
    confidences = [confidence_of(row, token, algorithm) for row, token in pairs]
    chances = [float(row[token]) for row, token in pairs]
    best = max(range(len(masked)), key=lambda i: confidences[i])
    taken = [i for i in range(len(masked)) if i == best or chances[i] > threshold]
    taken = [i for i in taken if tokens[i] != sampling.mask_token_id]
    if not taken:
        others = sampling.without_mask(logits[[position - 1 for position in masked]].float())
        best_others = others.softmax(dim=-1).max(dim=-1)
        tokens, chances = best_others.indices.tolist(), best_others.values.tolist()
        taken = [max(range(len(masked)), key=lambda i: chances[i])]
    for i in taken:
        canvas[masked[i]] = tokens[i]
    return Step(
        block,
        [masked[i] for i in taken],
        [tokens[i] for i in taken],
        [confidences[i] for i in taken],
        [chances[i] for i in taken],
    )


def cut(token_ids: list[int], eos_token_ids: Collection[int], max_tokens: int) -> list[int]:
    """The first ``max_tokens`` tokens, up to and including the first eos."""
    ends = (index + 1 for index, token in enumerate(token_ids) if token in eos_token_ids)
    return token_ids[: min(next(ends, max_tokens), max_tokens)]


def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    mask_token_id: int,
    eos_token_ids: Collection[int],
    block_length: int = 32,
    num_small_blocks: int = 4,
    algorithm: Algorithm = "confidence",
    threshold: float = 0.9,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    block_causal: bool = False,
) -> Generation:
    """Block diffusion of one prompt.

    Args:
        model: Causal LM whose attention takes a 4-D bool mask (``sdpa``), in float32.
        prompt_ids: Token ids of the prompt, at least one.
        max_tokens: Most new tokens; the last block is denoised whole and then cut.
        mask_token_id: Stands for an unfilled position; never generated.
        eos_token_ids: End the text.
        block_length: Tokens denoised together.
        num_small_blocks: Parts of a block, filled left to right.
        algorithm: What positions are ranked by.
        threshold: Positions whose token is more probable than this are filled at once; 1 fills
            one position a step.
        temperature: 0 is greedy.
        top_p, top_k, generator: Nucleus, number of best tokens kept and source of randomness, at
            a positive temperature.
        block_causal: As Fast-dLLM v2 (arXiv 2509.26328): with that :class:`Context`, blocks counted
            from the beginning of the prompt and the prompt's tail a part of the first canvas.

    Raises:
        ValueError: If an option is out of range.
    """
    if not prompt_ids:
        raise ValueError("prompt_ids must not be empty")
    if num_small_blocks < 1 or block_length % num_small_blocks:
        raise ValueError(
            f"num_small_blocks must divide block_length {block_length}, got {num_small_blocks}"
        )
    sampling = Sampling(mask_token_id, temperature, top_p, top_k, generator)
    context = Context(model, block_causal)
    piece = block_length if block_causal else len(prompt_ids)
    tail = len(prompt_ids) % piece
    whole = len(prompt_ids) - tail
    text = list(prompt_ids[whole:])
    steps: list[Step] = []
    ended = False
    for start in range(0, whole, piece):
        logits = context.append(prompt_ids[start : start + piece])
    while not ended and len(text) < tail + max_tokens:
        block, known = divmod(len(text), block_length)
        canvas = text[len(text) - known :] or [sampling.draw_text(logits)]
        canvas += [mask_token_id] * (block_length - len(canvas))
        for part in torch.arange(block_length).chunk(num_small_blocks):
            while masked := [i for i in part.tolist() if canvas[i] == mask_token_id]:
                step = denoise_step(context, canvas, masked, block, algorithm, threshold, sampling)
                steps.append(step)
            if ended := any(token in eos_token_ids for token in canvas[known:]):
                break
        else:
            logits = context.append(canvas)
        text += canvas[known:]
    return Generation(cut(text[tail:], eos_token_ids, max_tokens), context.forwards, steps)


def generate_ar(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    eos_token_ids: Collection[int],
    mask_token_id: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Plain autoregressive decoding with the same weights; arguments as for :func:`generate`."""
    if not prompt_ids:
        raise ValueError("prompt_ids must not be empty")
    sampling = Sampling(mask_token_id, temperature, top_p, top_k, generator)
    context = Context(model)
    logits = context.append(prompt_ids)
    text: list[int] = []
    while True:
        text.append(sampling.draw_text(logits))
        if text[-1] in eos_token_ids or len(text) >= max_tokens:
            return Generation(text, context.forwards)
        logits = context.append([text[-1]])
