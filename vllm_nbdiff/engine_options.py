# SPDX-License-Identifier: Apache-2.0
"""Server-wide options of `--additional-config '{"nbdiff": {...}}'` that no request can set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm_nbdiff.decoding.rules import RULES
from vllm_nbdiff.request_options import DEFAULT_MAX_DRAFTS, MODES, OPTION_KEYS

ATTENTION_KERNELS = ("triton", "torch")


@dataclass(frozen=True)
class Allowed:
    """What requests may ask for; None: everything. The server's own defaults always hold."""

    modes: tuple[str, ...] | None = None
    algorithms: tuple[str, ...] | None = None
    options: tuple[str, ...] | None = None
    """Options that a request may set at all, without their prefix."""


@dataclass(frozen=True)
class EngineOptions:
    """Every key but those that are defaults of the request options."""

    allow_mask_token_in_prompt: bool = False
    """Accept prompts that contain the mask token id."""
    max_steps_per_schedule: int | None = None
    """Forwards the worker runs before it returns to the scheduler; None: 16 on CPU, 1 elsewhere.
    Of requests that are decoded on the host."""
    static_shapes: bool | None = None
    """Shapes of a forward do not depend on data, as CUDA graphs need; None: true except on CPU."""
    attention_kernel: str | None = None
    """What the plugin's own attention backend runs: `triton`, the default, or for comparison
    `torch`."""
    max_drafts: int = DEFAULT_MAX_DRAFTS
    """Most canvases that a request may have computed beside its own in a forward (`freedave`)."""
    allow: Allowed = Allowed()
    """What requests may ask for."""


def parse_engine_options(user: dict[str, Any]) -> EngineOptions:
    """The engine options among the keys of `nbdiff`.

    Raises ValueError naming the key of a value that is wrong.
    """
    values = {f.name: user[f.name] for f in fields(EngineOptions) if f.name in user}
    for name in ("allow_mask_token_in_prompt", "static_shapes"):
        if name in values and not isinstance(values[name], bool):
            _refuse(name, "true or false", values)
    if not _is_whole(values.get("max_steps_per_schedule"), 1, optional=True):
        _refuse("max_steps_per_schedule", "a positive integer", values)
    if not _is_whole(values.get("max_drafts", 0), 0):
        _refuse("max_drafts", "an integer of at least 0", values)
    if values.get("attention_kernel") not in (None, *ATTENTION_KERNELS):
        _refuse("attention_kernel", f"one of {', '.join(ATTENTION_KERNELS)}", values)
    if "allow" in values:
        values["allow"] = _parse_allowed(values["allow"])
    return EngineOptions(**values)


def _refuse(name: str, wanted: str, values: dict[str, Any]) -> None:
    raise ValueError(f"--additional-config: nbdiff.{name} must be {wanted}, got {values[name]!r}")


def _is_whole(value: Any, low: int, optional: bool = False) -> bool:
    if value is None:
        return optional
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _parse_allowed(value: Any) -> Allowed:
    """`nbdiff.allow`: lists of names under `modes`, `algorithms` and `options`."""
    known = {
        "modes": MODES,
        "algorithms": tuple(RULES),
        "options": tuple(OPTION_KEYS.values()),
    }
    if not isinstance(value, dict) or (unknown := set(value) - set(known)):
        wrong = repr(value) if not isinstance(value, dict) else f"key {min(unknown, key=str)!r}"
        raise ValueError(
            f"--additional-config: nbdiff.allow must be an object of {', '.join(known)}, "
            f"got {wrong}"
        )
    for kind, names in value.items():
        if not isinstance(names, list) or any(name not in known[kind] for name in names):
            raise ValueError(
                f"--additional-config: nbdiff.allow.{kind} must be a list of "
                f"{', '.join(known[kind])}, got {names!r}"
            )
    return Allowed(**{kind: tuple(names) for kind, names in value.items()})
