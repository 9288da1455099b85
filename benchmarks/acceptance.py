# SPDX-License-Identifier: Apache-2.0
"""How many drafted tokens hold, by how the token before them is seen.

    python -m benchmarks.acceptance --problems 50

A draft of L - 1 tokens behind a known token is read off masks in one forward. That token's row is
either one of the canvas, which sees the masks (`bidirectional`), or causal (`causal`): then the row
gives the next token exactly, as AR decoding does, and the masks see KV that is final.

Plain transformers on AR decoding's own text; every answer's positions in turn. At temperature 1
drafts share the random number of their position with AR decoding. Then the schemes themselves, by
the columns of a draft: tokens a forward with a forward of its own for each draft, the token before
it as above, and with a draft there for every break point. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.nano import CHECKPOINT
from vllm_nbdiff.adapt.problems import held_out

MOST_TOKENS = 256
SCHEMES = ("bidirectional", "causal")


def visibility(known: int, length: int, causal: bool) -> Tensor:
    """[1, 1, T, T] bool: who sees whom among `known` tokens and the masks behind them.

    The last known token is part of the canvas unless it is `causal`.
    """
    total = known + length - 1
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    first = known if causal else known - 1
    seen[first:, first:] = True
    return seen[None, None]


def draw(logits: Tensor, mask: int, numbers: Tensor | None) -> Tensor:
    """[n] tokens from logits [n, V]: the best, or by inverse CDF at `numbers` [n]."""
    logits = logits.float().clone()
    logits[:, mask] = -torch.inf
    if numbers is None:
        return logits.argmax(1)
    cdf = logits.double().softmax(1).cumsum(1)
    return torch.searchsorted(cdf, numbers[:, None] * cdf[:, -1:])[:, 0]


@torch.inference_mode()
def ar_text(model: PreTrainedModel, prompt: Tensor, mask: int, numbers: Tensor | None) -> Tensor:
    """The prompt [n] and what AR decoding gives, up to its end."""
    ids, cache, rows = prompt[None], None, prompt[None]
    while ids.shape[1] < len(prompt) + MOST_TOKENS:
        out = model(rows, past_key_values=cache, use_cache=True)
        cache, place = out.past_key_values, ids.shape[1]
        number = None if numbers is None else numbers[place : place + 1]
        rows = draw(out.logits[:, -1], mask, number)[None]
        ids = torch.cat([ids, rows], 1)
        if int(rows) == model.config.eos_token_id:
            break
    return ids[0]


@torch.inference_mode()
def held(
    model: PreTrainedModel, text: Tensor, place: int, length: int, mask: int, numbers: Tensor | None
) -> dict[str, Tensor]:
    """By scheme, which of the drafts behind the token at `place` are AR decoding's: [length] bool.

    The first of them stands for the token right behind it. Places behind the text's end are left
    out.
    """
    known = text[: place + 1]
    ids = torch.cat([known, torch.full((length - 1,), mask)])[None]
    own = None if numbers is None else numbers[place + 1 : place + 1 + length]
    truth = text[place + 1 : place + 1 + length]
    found = {}
    for scheme in SCHEMES:
        seen = visibility(len(known), length, scheme == "causal")
        rows = model(ids, attention_mask=_additive(seen)).logits[0, place:]
        found[scheme] = draw(rows, mask, own)[: len(truth)] == truth
    return found


def _additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


Held = dict[str, list[int]]
"""By scheme and position in an answer: how many drafted tokens hold, the first wrong one apart."""


def runs(model: PreTrainedModel, prompts: list[Tensor], length: int, sampled: bool) -> list[Held]:
    """Of each answer. An entry stands for the token at that place, the first for the one before."""
    mask, generator = model.config.mask_token_id, torch.Generator().manual_seed(0)
    found = []
    for prompt in prompts:
        numbers = None
        if sampled:
            numbers = torch.rand(len(prompt) + MOST_TOKENS + length, generator=generator).double()
        text = ar_text(model, prompt, mask, numbers)
        own: Held = {scheme: [] for scheme in SCHEMES}
        for place in range(len(prompt) - 1, len(text) - 1):
            for scheme, right in held(model, text, place, length, mask, numbers).items():
                own[scheme].append(int(right.cumprod(0).sum()))
        found.append(own)
    return found


def share(found: list[Held], scheme: str, place: int) -> float:
    """How often a draft's token at `place` from 1 and all before it hold, of those in the text."""
    held_there = inside = 0
    for own in found:
        ahead = own[scheme][: len(own[scheme]) - place + 1]
        inside += len(ahead)
        held_there += sum(run >= place for run in ahead)
    return held_there / max(inside, 1)


def tokens_per_forward(found: list[Held], width: int) -> dict[str, float]:
    """Of drafts of `width` columns, the token they begin with among them."""
    tokens = sum(len(own["causal"]) for own in found)
    forwards = dict.fromkeys(("two forwards", "two, causal", "every break point"), 0)
    for own in found:
        plain, causal, end = own["bidirectional"], own["causal"], len(own["causal"])
        # `at` counts tokens that are final or known; the prompt's end gave the first.
        at = 1
        while at <= end:
            forwards["two forwards"] += 2
            at += (min(plain[at], width - 1) if at < end else 0) + 1
        at = 1
        while at <= end:
            forwards["two, causal"] += 1
            drafted, at = at, at + 1
            if at <= end:
                forwards["two, causal"] += 1
                at += min(causal[drafted] - 1, width - 1) + 1
        at, count = 1, 1
        while at < end:
            count += 1
            at += min(causal[at] - 1, width - 1) + 1
        forwards["every break point"] += count
    return {name: tokens / count for name, count in forwards.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--length", type=int, default=32, help="a draft and the token before it")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [
        torch.tensor(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": problem.prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for problem in held_out(args.problems, seed=1)
    ]
    places = [place for place in (1, 2, 4, 8, 16, 31) if place < args.length]
    widths = [width for width in (8, 16, 32) if width <= args.length]
    result: dict[str, Any] = {"model": args.model.name, "problems": args.problems}
    for temperature in (0, 1):
        found = runs(model, prompts, args.length, temperature > 0)
        print(f"| temperature {temperature} | " + " | ".join(map(str, places)) + " |")
        print("|---" * (len(places) + 1) + "|")
        for scheme in SCHEMES:
            shares = [share(found, scheme, place) for place in range(1, args.length)]
            cells = " | ".join(f"{shares[place - 1]:.3f}" for place in places)
            print(f"| {scheme} | {cells} |")
            result[f"{scheme}, temperature {temperature}"] = [round(x, 4) for x in shares]
        for width in widths:
            speeds = tokens_per_forward(found, width)
            print(f"{width} columns: " + ", ".join(f"{k} {v:.2f}" for k, v in speeds.items()))
            result[f"{width} columns, temperature {temperature}"] = speeds
    print(json.dumps(result))


if __name__ == "__main__":
    main()
