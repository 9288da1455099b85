# SPDX-License-Identifier: Apache-2.0
"""How a request is refused, and texts that every part of one is refused for."""

from __future__ import annotations

import re
import reprlib
from typing import Any, NoReturn

_SURROGATE = re.compile(r"[\ud800-\udfff]")


class OptionError(ValueError):
    """A request option that is refused; `key` is its request key."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def refuse(name: str, message: str) -> NoReturn:
    """Raise VLLMValidationError (HTTP 400) naming the parameter."""
    from vllm.exceptions import VLLMValidationError

    raise VLLMValidationError(f"{name} {message}", parameter=name)


def check_texts(name: str, value: Any) -> None:
    """Refuse a JSON value with a text, keys included, that UTF-8 and so no transport can hold.

    Raises VLLMValidationError (HTTP 400) naming the field.
    """
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
            refuse(name, f"holds half of a surrogate pair, got {reprlib.repr(value)}")
        if isinstance(value, dict):
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += [inner for inner in value if isinstance(inner, str | list | tuple | dict)]
