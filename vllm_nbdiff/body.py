# SPDX-License-Identifier: Apache-2.0
"""What the body of an HTTP request may hold, where vLLM's request models do not say it by name."""

from __future__ import annotations

from typing import Any

from vllm_nbdiff.refusal import check_texts, refuse

# An instance stands for an object where vLLM makes a request of another endpoint's.
_NO_OBJECT = str | int | float | list


def check_body(data: Any) -> Any:
    """Check a completion's or a chat's body before vLLM does, and return it.

    Raises VLLMValidationError (HTTP 400) naming the field.
    """
    if not isinstance(data, dict):
        return data
    for name, value in data.items():
        if isinstance(name, str) and name.isidentifier():  # others are ignored
            check_texts(name, value)
    if data.get("use_beam_search"):
        refuse("use_beam_search", "is not supported with block-diffusion models")
    if isinstance(data.get("structured_outputs"), _NO_OBJECT):
        refuse("structured_outputs", "must be an object")
    if "messages" in data and isinstance(data["messages"], str | int | float | None):
        refuse("messages", "must be a list")
    return data
