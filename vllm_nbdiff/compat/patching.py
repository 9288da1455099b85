# SPDX-License-Identifier: Apache-2.0
"""How a function of vLLM is replaced: once, with the original at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

MARK = "_nbdiff_patched"


def patch(owner: type | ModuleType, name: str, make: Callable[[Any], Any]) -> None:
    """Replace attribute `name` of `owner` by `make(original)`, once."""
    original = owner.__dict__[name]
    inner: Any = original.fget if isinstance(original, property) else original
    if getattr(inner, MARK, False):
        return
    replacement = functools.wraps(inner)(make(inner))
    setattr(replacement, MARK, True)
    setattr(owner, name, property(replacement) if isinstance(original, property) else replacement)
