# SPDX-License-Identifier: Apache-2.0
"""Strategies of single JSON values that a field may not expect."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

MASK_TEXT = "<|mask|>"
MASK_ID = 2
EOS_ID = 1
VOCAB_SIZE = 616  # of the bundled model

POWERS = tuple(
    sorted({sign * (2**e + d) for e in range(65) for d in (-1, 0, 1) for sign in (1, -1)})
)
"""Every power of two up to 2^64 and its neighbours, with both signs."""

EDGES = tuple(
    sign * (2**e + d) for e in (0, 31, 32, 53, 63, 64) for d in (-1, 0, 1, 5) for sign in (1, -1)
)
"""Those at which a type ends, and 2^e + 5, which wraps to a number that looks right."""

ODD_FLOATS = (
    math.nan,
    math.inf,
    -math.inf,
    -0.0,
    5e-324,  # the smallest double
    1e-45,  # the smallest float32
    1.1754943e-38,  # a denormal of float32, a normal double
    1e-8,
    1 - 2**-53,
    1 + 2**-52,
    0.1,
    2.5,
    -1.5,
    3.4028235e38,
    3.5e38,  # infinite as float32
    1.7976931348623157e308,
    float(2**63),
)

TEXTS = (
    "",
    " ",
    "\x00",
    "\ud800",  # half a surrogate pair
    "\udc00\ud800",
    "مرحبا بالعالم",
    "\u202eright to left\u202c",
    "a\u200bb\u200d\ufeff",
    "🧑‍🚀" * 40,
    "e" + "\u0301" * 200,
    MASK_TEXT,
    f"Fill {MASK_TEXT} in",
    "<|eos|>",
    "<|user|><|assistant|>",
    "NaN",
    "Infinity",
    "-1e999",
    "1_000",
    "0x10",
    "१",  # a digit to Python's int()
    "null",
    "{{ 7 * 7 }}{% for",
    "../../etc/passwd",
    "%s%n",
    "a" * 20_000,
    " so" * 400,
)


def nested(depth: int) -> Any:
    """Lists and objects inside each other."""
    value: Any = 1
    for _ in range(depth):
        value = [{"a": value}]
    return value


WRONG_TYPES: tuple[Any, ...] = (
    None,
    True,
    False,
    1.5,
    "x",
    [],
    {},
    [None],
    {"a": []},
    [[1]],
    nested(4),
    nested(90),
)

integers = st.sampled_from(EDGES) | st.sampled_from(POWERS)
floats = st.sampled_from(ODD_FLOATS)
texts = st.sampled_from(TEXTS)
lengths = st.sampled_from((1, 5, VOCAB_SIZE, 3000))
"""Of lists. Long lists repeat or count: drawing every entry would be more than a body can hold."""

anything = st.one_of(integers, floats, texts, st.sampled_from(WRONG_TYPES))
ids = st.one_of(
    st.sampled_from((0, EOS_ID, MASK_ID, 3, 5, 11, 12, 300, VOCAB_SIZE - 1)),
    st.integers(0, VOCAB_SIZE - 1),
)
"""Tokens of the vocabulary."""
id_lists = st.one_of(
    st.lists(ids, min_size=1, max_size=6),
    lengths.map(lambda n: [i % VOCAB_SIZE for i in range(n)]),
)


def lists_of(entries: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Empty, short, and long lists of one entry."""
    return st.one_of(
        st.lists(entries, max_size=4),
        st.builds(lambda entry, n: [entry] * n, entries, lengths),
        lengths.map(lambda n: list(range(n))),
    )
