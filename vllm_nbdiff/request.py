# SPDX-License-Identifier: Apache-2.0
"""Per-request options: parsed, validated, typed.

Read from `SamplingParams(extra_args=...)`, over HTTP `vllm_xargs`. Import-light: used by the
frontend at admission and by the workers.
"""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_nbdiff.decoding.rules import RULES
from vllm_nbdiff.families.family import Family
from vllm_nbdiff.refusal import OptionError
from vllm_nbdiff.request_options import (
    FREEDAVE,
    KEY_OF,
    MODES,
    OPTION_KEYS,
    RequestOptions,
)

if TYPE_CHECKING:
    from vllm_nbdiff.config import BlockDiffusionConfig

# Far beyond what has an effect, and what every array of the engine holds.
MAX_STEPS = 1 << 16
MAX_THRESHOLD = 1e6

# What vLLM itself reads of a request's `extra_args` (vllm/v1/request.py) and `vllm_xargs`
# (vllm/entrypoints/generate/base/serving.py), and the type that it takes unseen.
_KEYS_OF_VLLM = {
    "kv_transfer_params": dict,
    "ec_transfer_params": dict,
    "kv_cache_report_mode": str,
    "session_id": str,
}
_NAMES = {dict: "an object", str: "a string"}

_OF_DIFFUSION = {"small_blocks", "block_length", "max_steps", "block_cache"}
_OF_VERIFY = {"draft_length", "draft_steps", "fan_out"}
_OF_DRAFTS = {"algorithm", "threshold", "fused_commit"}
_OF_EDITS = {"editing_threshold", "max_post_steps"}
# Options that a request cannot set in a mode, because they would change nothing.
INAPPLICABLE = {
    "diffusion": _OF_VERIFY,
    "verify": _OF_DIFFUSION,
    "ar": _OF_DIFFUSION | _OF_VERIFY | _OF_DRAFTS,
    "auto": _OF_DIFFUSION | _OF_VERIFY | _OF_DRAFTS,
}


def check_option(name: str, value: Any, max_block_length: int) -> None:
    """Check the type and range of one option. Raises OptionError naming its request key."""
    wanted = None
    if name in ("algorithm", "mode"):
        names = tuple(RULES) if name == "algorithm" else MODES
        if value not in names:
            wanted = f"one of {', '.join(names)}"
    elif name in ("fused_commit", "block_cache", "step_map"):
        if value not in (0, 1):
            wanted = "0 or 1"
    elif name in ("threshold", "editing_threshold"):
        limit = MAX_THRESHOLD if name == "threshold" else 1.0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= limit:
            wanted = f"a number of at least 0 and at most {limit:.0f}"
    else:
        steps = name in ("max_steps", "draft_steps", "max_post_steps")
        least = int(name not in ("max_post_steps", "fan_out"))
        most = MAX_STEPS if steps else max_block_length
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            wanted = f"an integer of at least {least} and at most {most}"
    if wanted is not None:
        key = KEY_OF[name]
        raise OptionError(key, f"{key} must be {wanted}, got {reprlib.repr(value)}")


def inapplicable_to(algorithm: str) -> set[str]:
    """Options that a request cannot set with an algorithm, because they would change nothing."""
    rule = RULES[algorithm]
    return {"max_steps"} if rule.edits else _OF_EDITS | ({"threshold"} if rule.is_fixed else set())


def check_family(name: str, value: Any, family: Family) -> None:
    """Raise OptionError for what does not apply to the models of `family`."""
    if (reason := family.refusal(name, value)) is not None:
        raise OptionError(KEY_OF[name], f"{KEY_OF[name]}{reason}")


def parse_options(
    extra_args: dict[str, Any] | None, config: BlockDiffusionConfig
) -> RequestOptions:
    """The options of one request. Raises OptionError naming the offending key."""
    values: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        name = OPTION_KEYS.get(key)
        if name is not None:
            check_option(name, value, config.block_length)
            check_family(name, value, config.family)
            _check_allowed(name, value, config)
            values[name] = value
        elif key not in _KEYS_OF_VLLM:
            raise _unknown(str(key))
        elif value is not None and not isinstance(value, wanted := _KEYS_OF_VLLM[key]):
            got = reprlib.repr(value)
            raise OptionError(key, f"{key} must be {_NAMES[wanted]}, got {got}")
    if not values:
        return config.defaults
    options = replace(_unresolved(config, values), **values)
    mode = options.mode
    inapplicable = INAPPLICABLE[mode]
    where = f"nbdiff_mode={mode}"
    if options.algorithm == FREEDAVE:
        inapplicable = inapplicable - {"draft_steps"}
    elif mode == "verify" and options.verify_steps == 1:
        # A single step fills the whole draft.
        inapplicable = inapplicable | {"algorithm", "threshold"}
        where += " with nbdiff_draft_steps 1"
    for key, name in OPTION_KEYS.items():
        if name in values and name in inapplicable:
            raise OptionError(key, f"{key} does not apply to {where}")
        if name in values and name in inapplicable_to(options.algorithm):
            raise OptionError(key, f"{key} does not apply to nbdiff_algorithm={options.algorithm}")
    return options.resolved()


def _unknown(key: str) -> OptionError:
    """The error for a key that nobody reads, with the option that may have been meant."""
    stem = key.removeprefix("nbdiff_").removeprefix("diffusion_")
    meant = difflib.get_close_matches(stem, KEY_OF, n=1)
    hint = f"did you mean {KEY_OF[meant[0]]}?" if meant else f"known: {', '.join(OPTION_KEYS)}"
    shown = key if len(key) <= 64 else f"{key[:64]}..."
    quoted = shown if key.isidentifier() else repr(shown)
    return OptionError(
        shown, f"unknown option {quoted} in extra_args (vllm_xargs over HTTP); {hint}"
    )


def _check_allowed(name: str, value: Any, config: BlockDiffusionConfig) -> None:
    """Raise OptionError for what `nbdiff.allow` rules out; the server's default never is."""
    allow = config.engine.allow
    choices = {"mode": allow.modes, "algorithm": allow.algorithms}.get(name)
    barred = choices is not None and value not in (*choices, getattr(config.defaults, name))
    key = KEY_OF[name]
    if allow.options is not None and name not in allow.options:
        raise OptionError(key, f"{key} is not allowed by this server (nbdiff.allow.options)")
    if barred:
        raise OptionError(key, f"{key}={value} is not allowed by this server (nbdiff.allow)")


def _unresolved(config: BlockDiffusionConfig, values: dict[str, Any]) -> RequestOptions:
    """Server defaults, with those that depend on an option the request sets left open again."""
    base, freedave = config.defaults, config.defaults.algorithm == FREEDAVE
    if freedave and values.get("mode", "diffusion") != "diffusion":
        base = replace(base, algorithm="confidence", threshold=None)
    if (values.get("algorithm", base.algorithm) == FREEDAVE) != freedave:
        base = replace(base, draft_steps=None)  # it means something else
    if values.get("fused_commit") or (values.get("draft_steps") or 1) > 1:
        base = replace(base, fan_out=None)
    if values.get("algorithm", base.algorithm) != base.algorithm:
        base = replace(base, threshold=None)
    if values.get("block_length", base.block_length) != base.block_length:
        base = replace(base, small_blocks=None)
    return base
