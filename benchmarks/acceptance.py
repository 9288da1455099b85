# SPDX-License-Identifier: Apache-2.0
"""How many drafted tokens hold, by how the token before them is seen.

    python -m benchmarks.acceptance --problems 50

A draft of L - 1 tokens behind a known token is read off masks in one forward. That token's row is
either one of the canvas, which sees the masks (`bidirectional`), or causal (`causal`): then the row
gives the next token exactly, as AR decoding does, and the masks see KV that is final. Where drafts
are made for a break point of a round that is still being verified, the next token is not known yet:
the drafts begin behind it (`fan-out`).

Plain transformers on AR decoding's own text; every answer's positions in turn. Temperature 1: drafts
share the random number of their position with AR decoding. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.nano import CHECKPOINT
from vllm_nbdiff.adapt.problems import held_out

MOST_TOKENS = 256
SCHEMES = ("bidirectional", "causal", "fan-out")


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
    for scheme in SCHEMES[:2]:
        seen = visibility(len(known), length, scheme == "causal")
        rows = model(ids, attention_mask=_additive(seen)).logits[0, place:]
        found[scheme] = draw(rows, mask, own)[: len(truth)] == truth
    # The token right behind is known from verification, whatever is drafted for it.
    found["fan-out"] = found["causal"].clone()
    found["fan-out"][:1] = True
    return found


def _additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def measure(
    model: PreTrainedModel, prompts: list[Tensor], length: int, mask: int, sampled: bool
) -> dict[str, list[float]]:
    """By scheme and place, how often a draft and all before it hold."""
    sums = {scheme: torch.zeros(length) for scheme in SCHEMES}
    counts = torch.zeros(length)
    generator = torch.Generator().manual_seed(0)
    for prompt in prompts:
        numbers = None
        if sampled:
            numbers = torch.rand(len(prompt) + MOST_TOKENS + length, generator=generator).double()
        text = ar_text(model, prompt, mask, numbers)
        for place in range(len(prompt), len(text) - 1):
            for scheme, right in held(model, text, place, length, mask, numbers).items():
                sums[scheme][: len(right)] += right.cumprod(0)
            counts[: len(right)] += 1
    return {scheme: (total / counts.clamp(min=1)).tolist() for scheme, total in sums.items()}


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
    mask = model.config.mask_token_id
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
    print(
        "| temperature | known token | " + " | ".join(map(str, (1, 2, 4, 8, 16, 31))) + " | sum |"
    )
    print("|---|---|" + "---|" * 7)
    results = []
    for temperature in (0, 1):
        found = measure(model, prompts, args.length, mask, temperature > 0)
        for scheme, shares in found.items():
            cells = [shares[n - 1] for n in (1, 2, 4, 8, 16, 31) if n <= len(shares)]
            texts = " | ".join(f"{cell:.3f}" for cell in cells)
            print(f"| {temperature} | {scheme} | {texts} | {sum(shares):.2f} |")
            results.append({"temperature": temperature, "scheme": scheme, "held": shares})
    print(json.dumps({"model": args.model.name, "problems": args.problems, "rows": results}))


if __name__ == "__main__":
    main()
