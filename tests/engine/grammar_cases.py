# SPDX-License-Identifier: Apache-2.0
"""Constraints of structured output at random, and whether a text meets one."""

import json
import re
from random import Random
from typing import Any

import jsonschema


def random_schema(rng: Random, depth: int = 2) -> dict[str, Any]:
    """A JSON schema whose texts are short."""
    kinds = ["enum", "integer", "number", "boolean", "string", "null"]
    kind = rng.choice(kinds + (["object", "array"] * 3 if depth else []))
    if kind == "object":
        names = rng.sample(["day", "eggs", "party of Carla", "in", "left"], rng.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        low = rng.randint(0, 2)
        items = random_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if kind == "enum":
        return {"enum": rng.sample(["Friday", "Mon day", 7, 22.5, None, True, ""], 3)}
    limits = {"string": {"maxLength": 9}, "integer": {"minimum": -3, "maximum": 40}}
    return {"type": kind, **limits.get(kind, {})}


def random_constraint(rng: Random) -> dict[str, Any]:
    """A schema, an expression or a choice."""
    kind = rng.choice(["json", "json", "regex", "choice"])
    if kind == "json":
        return {"json": random_schema(rng)}
    if kind == "regex":
        parts = ["[A-Z][a-z]{1,5}", "(yes|no)", "[0-9]{2,4}", "( \\+ [0-9]){0,3}", "é?", "Answer: "]
        return {"regex": " ".join(rng.choices(parts, k=rng.randint(1, 4)))}
    words = ["Monday", "Tuesday", "In the end", "22 - 2 = 20", "Answer", "Answer: 4", "ü"]
    return {"choice": rng.sample(words, rng.randint(1, 4))}


def is_valid(constraint: dict[str, Any], text: str) -> bool:
    if "json" in constraint:
        # xgrammar lets strings of limited length hold control characters, and takes the bytes of a
        # surrogate for one character where decoding makes three replacements of them.
        text = text.replace("\ufffd" * 3, "\ufffd")
        jsonschema.validate(json.loads(text, strict=False), constraint["json"])
        return True
    if "regex" in constraint:
        return re.fullmatch(constraint["regex"], text) is not None
    return text in constraint["choice"]
