# SPDX-License-Identifier: Apache-2.0
"""How large a number of a request may be, and how much one request may bring.

The limits of lists are those of vLLM's own sampler (vllm/v1/worker/gpu/sample/logit_bias.py,
bad_words.py) where it has one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

INT32_MAX = (1 << 31) - 1
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1

MAX_STOP_TOKEN_IDS = 10_000
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 1e9
# Kept for every request that runs, while one asks for so many.
MAX_LOGPROBS = 1024
MAX_LOGPROB_TOKEN_IDS = 128  # vLLM's
GRAMMAR_BACKENDS = ("xgrammar", "guidance")
MAX_STOP_STRINGS = 256
# More characters cannot be few enough tokens.
MAX_BAD_WORDS_CHARACTERS = 1 << 16
# A word is compared with every place that it may take around a position.
MAX_BAD_WORD_TOKENS = 64
# Of a schema, an expression or another grammar: the time to compile it grows with it.
MAX_GRAMMAR_CHARACTERS = 1 << 17
# After every token the scheduler looks for patterns of every size, each `min_count` times as long.
MAX_PATTERN_SIZE = 256
MAX_REPEATED_TOKENS = 2048
# Draws are as with any smaller one: some token is at least so probable.
MIN_TOP_P = 1e-6


@dataclass(frozen=True)
class Range:
    """The values of a number, ends included."""

    low: float
    high: float
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is a number of the right type in the range; NaN never is."""
        kind = int if self.whole else int | float
        return (
            isinstance(value, kind)
            and not isinstance(value, bool)
            and self.low <= value <= self.high
        )

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        top = f" and at most {self.high}" if math.isfinite(self.high) else ""
        return f"{kind} of at least {self.low}{top}"


# Without an upper end: beyond it a value has no effect, and `clamp` brings it there.
RANGES = {
    "n": Range(1, INT32_MAX, whole=True),
    "temperature": Range(0, 2),
    "top_p": Range(0, 1),
    "top_k": Range(-1, math.inf, whole=True),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0.01, 100),
    "max_tokens": Range(1, math.inf, whole=True),
    "min_tokens": Range(0, math.inf, whole=True),
    "logprobs": Range(-1, MAX_LOGPROBS, whole=True),
    "prompt_logprobs": Range(-1, INT32_MAX, whole=True),
    "stream_interval": Range(1, INT32_MAX, whole=True),
}
