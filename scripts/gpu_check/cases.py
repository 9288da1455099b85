# SPDX-License-Identifier: Apache-2.0
"""Requests to the bundled model and the tokens that a CPU gave them.

python -m scripts.gpu_check.cases          # answers them on a CPU and writes tokens.json
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS = Path(__file__).with_name("tokens.json")
LENGTHS = (1, 2, 7, 16, 31, 32, 33, 40)
MAX_TOKENS = 64
MODES: dict[str, dict[str, Any]] = {
    "diffusion": {},
    "threshold": {"nbdiff_threshold": 0.9, "nbdiff_small_blocks": 2},
    "fused": {"nbdiff_fused_commit": 1},
    "block_cache": {"nbdiff_block_cache": 1},
    "freedave": {"nbdiff_algorithm": "freedave"},
    "short": {"nbdiff_block_length": 8, "nbdiff_small_blocks": 1},
    "penalty": {},
    "constraints": {},
    "constrained verify": {"nbdiff_mode": "verify"},
    "verify": {"nbdiff_mode": "verify"},
    "ar": {"nbdiff_mode": "ar"},
    "auto": {"nbdiff_mode": "auto"},
}
# What a device is given of a request that arrives, and texts that end by themselves.
CONSTRAINTS: dict[str, Any] = {
    "allowed_token_ids": [1, *range(16, 500)],
    "bad_words": ["13", "+ 8"],
    "frequency_penalty": 0.1,
    "ignore_eos": False,
    "logit_bias": {1: 0.5, 296: -2.0},
    "min_tokens": 4,
    "stop_token_ids": [282, 331],
}
SAMPLING: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.2},
    "constraints": CONSTRAINTS,
    "constrained verify": CONSTRAINTS,
}


@dataclass(frozen=True)
class Case:
    """A greedy request."""

    mode: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.mode} after {len(self.prompt)}"


def bundled_cases() -> list[Case]:
    """Every mode after prompts of every length, with the stored tokens."""
    stored = json.loads(TOKENS.read_text(encoding="utf-8"))
    return [
        Case(mode, tuple(prompt), tuple(tokens), MODES[mode], SAMPLING.get(mode, {}))
        for mode, rows in stored.items()
        for prompt, tokens in rows
    ]


def main() -> None:
    """Answer every case on the plain functions of a CPU, one at a time."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from scripts.gpu_check.engines import BUNDLED, answers
    from vllm_nbdiff.adapt.problems import held_out

    llm = LLM(model=str(BUNDLED), dtype="float32", max_model_len=512, enforce_eager=True)
    tokenizer = llm.get_tokenizer()
    chats = [[{"role": "user", "content": problem.prompt}] for problem in held_out(len(LENGTHS))]
    full = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    # What lies before a question is the end of another one.
    prompts = [
        [*full[i - 1]["input_ids"], *full[i]["input_ids"]][-n:] for i, n in enumerate(LENGTHS)
    ]
    rows: dict[str, list[Any]] = {}
    for mode, options in MODES.items():
        sampling = SAMPLING.get(mode, {})
        cases = [Case(mode, tuple(prompt), (), options, sampling) for prompt in prompts]
        rows[mode] = [[list(c.prompt), answers(llm, [c])[0]] for c in cases]
    TOKENS.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
