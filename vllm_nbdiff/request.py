# SPDX-License-Identifier: Apache-2.0
"""Per-request options: parsed, validated, typed.

Read from `SamplingParams(extra_args=...)`, over HTTP `vllm_xargs`. Import-light: used by the
frontend at admission and by the workers.
"""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_nbdiff.decoding.rules import RULES
from vllm_nbdiff.families.family import NBDIFF, Family
from vllm_nbdiff.refusal import OptionError

if TYPE_CHECKING:
    from vllm_nbdiff.config import BlockDiffusionConfig

MODES = ("diffusion", "verify", "ar", "auto")
DEFAULT_DRAFT_LENGTH = 16
DEFAULT_DRAFT_STEPS = 1
DEFAULT_FREEDAVE_STEPS = 4
DEFAULT_FAN_OUT = 4
DEFAULT_MAX_DRAFTS = 8
DEFAULT_EDITING_THRESHOLD = 0.5
DEFAULT_MAX_POST_STEPS = 16
FREEDAVE = "freedave"
# Far beyond what has an effect, and what every array of the engine holds.
MAX_STEPS = 1 << 16
MAX_THRESHOLD = 1e6

# extra_args key -> RequestOptions field
OPTION_KEYS = {
    "nbdiff_algorithm": "algorithm",
    "nbdiff_threshold": "threshold",
    "nbdiff_small_blocks": "small_blocks",
    "nbdiff_block_length": "block_length",
    "nbdiff_mode": "mode",
    "nbdiff_draft_length": "draft_length",
    "nbdiff_draft_steps": "draft_steps",
    "nbdiff_fan_out": "fan_out",
    "nbdiff_fused_commit": "fused_commit",
    "nbdiff_block_cache": "block_cache",
    "nbdiff_editing_threshold": "editing_threshold",
    "nbdiff_max_post_steps": "max_post_steps",
    "nbdiff_step_map": "step_map",
    "diffusion_max_steps": "max_steps",
}
_KEY_OF = {name: key for key, name in OPTION_KEYS.items()}
# What vLLM itself reads of a request's `extra_args` (vllm/v1/request.py).
_KEYS_OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")

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
# FreeDave does steps of one position each; its drafts are whole canvases of one block.
_OF_FREEDAVE = {
    "mode": "diffusion",
    "threshold": 1.0,
    "max_steps": None,
    "fused_commit": False,
    "block_cache": False,
}


@dataclass(frozen=True)
class RequestOptions:
    """How one request's blocks are denoised; None means the default that depends on others."""

    algorithm: str = "confidence"
    """What ranks masked positions and which ones are filled: a name of `decoding.rules.RULES`."""
    threshold: float | None = None
    """The rule's parameter. For `confidence`, `entropy`, `margin`: positions whose token is more
    probable are also taken; 1: one position a step."""
    small_blocks: int | None = None
    """Number of sub-blocks a block is filled in, left to right. Default: of `sub_block_length`."""
    block_length: int = 32
    """Tokens denoised together; at most the served block length."""
    max_steps: int | None = None
    """At most so many denoise steps a block; None: no limit."""
    mode: str = "diffusion"
    """`diffusion`; `verify`: blocks are drafted by denoising and verified by a causal pass, the
    text is that of AR decoding; `ar`: token by token; `auto`: `verify` with as many drafted tokens,
    or none, as give the most tokens a second."""
    draft_length: int | None = None
    """`verify`: tokens of a draft, the seed included; at most a block. Default: 16 or a block."""
    draft_steps: int | None = None
    """As given: of `verify_steps` in mode `verify`, of `num_drafts` with algorithm `freedave`."""
    fan_out: int | None = None
    """As given: of `break_points`."""
    fused_commit: bool = False
    """Commit a block in the forward that first denoises the next one, with its seed guessed; a
    wrong guess costs rows, never tokens."""
    block_cache: bool = False
    """Between the first step of a sub-block and the next sub-block, compute only its own rows and
    reuse the KV of the rest of the canvas (Fast-dLLM v2); changes the text."""
    editing_threshold: float = DEFAULT_EDITING_THRESHOLD
    """`edit`: filled positions whose best token is another, and more probable, are filled again."""
    max_post_steps: int = DEFAULT_MAX_POST_STEPS
    """`edit`: at most so many steps edit a block that has no masks."""
    step_map: bool = False
    """Tell of every token which denoise step filled it."""
    sub_block_length: int | None = NBDIFF.sub_block_length
    """The family's default of sub-blocks, None: a block; no request sets it."""
    max_drafts: int = DEFAULT_MAX_DRAFTS
    """The server's limit of `num_drafts`; no request sets it."""

    @property
    def draft_width(self) -> int:
        """Tokens that a verified draft has at most, the seed included; 1 is AR decoding."""
        if self.mode == "ar":
            return 1
        return min(self.draft_length or DEFAULT_DRAFT_LENGTH, self.block_length)

    @property
    def verify_steps(self) -> int:
        """Denoise steps that draft a block which is then verified."""
        return self.draft_steps or DEFAULT_DRAFT_STEPS

    @property
    def break_points(self) -> int:
        """Places at which a verified draft may break off for which the next one is made in the same
        forward, at most; 0: drafts have forwards of their own."""
        if self.mode not in ("verify", "auto") or self.fused_commit or self.verify_steps > 1:
            return 0
        most = DEFAULT_FAN_OUT if self.fan_out is None else self.fan_out
        return min(most, self.draft_width)

    @property
    def num_drafts(self) -> int:
        """Canvases that a denoise forward may compute beside the request's own (FreeDave)."""
        return min(self._wanted_drafts, self.max_drafts)

    @property
    def _wanted_drafts(self) -> int:
        if self.algorithm != FREEDAVE:
            return 0
        assert self.small_blocks is not None
        steps = self.draft_steps or DEFAULT_FREEDAVE_STEPS
        return min(steps - 1, self.block_length // self.small_blocks)

    def resolved(self) -> RequestOptions:
        """The same options with every dependent default filled in and checked together.

        Raises OptionError when `block_length` is not divisible by `small_blocks`, the threshold is
        beyond the algorithm's range, or the algorithm does not combine with another option.
        """
        threshold, small_blocks = self.threshold, self.small_blocks
        rule = RULES[self.algorithm]
        if threshold is None:
            threshold = rule.threshold
        if rule.limit is not None and threshold > rule.limit:
            raise OptionError(
                "nbdiff_threshold",
                f"nbdiff_threshold must be a number in [0, {rule.limit:g}] for {self.algorithm}, "
                f"got {threshold!r}",
            )
        if small_blocks is None:
            size = self.sub_block_length or self.block_length
            small_blocks = 1 if self.block_length % size else self.block_length // size
        if self.block_length % small_blocks:
            raise OptionError(
                "nbdiff_small_blocks",
                f"nbdiff_small_blocks: block length {self.block_length} is not divisible by "
                f"{small_blocks}",
            )
        resolved = replace(self, threshold=float(threshold), small_blocks=small_blocks)
        if self.algorithm == FREEDAVE:
            resolved._check_freedave()
        if self.fan_out and (self.fused_commit or self.verify_steps > 1):
            other = "nbdiff_fused_commit" if self.fused_commit else "nbdiff_draft_steps above 1"
            message = f"nbdiff_fan_out={self.fan_out} does not combine with {other}"
            raise OptionError("nbdiff_fan_out", message)
        return resolved

    def _check_freedave(self) -> None:
        """Raise OptionError for what does not combine, or exceeds the server's limit."""
        for key, name in OPTION_KEYS.items():
            value = getattr(self, name)
            if name in _OF_FREEDAVE and value != _OF_FREEDAVE[name]:
                message = f"{key}={value} does not apply to nbdiff_algorithm={FREEDAVE}"
                raise OptionError(key, message)
        if self.draft_steps is not None and self._wanted_drafts > self.max_drafts:
            raise OptionError(
                "nbdiff_draft_steps",
                f"nbdiff_draft_steps={self.draft_steps} drafts {self._wanted_drafts} canvases in "
                f"a forward; this server allows {self.max_drafts} (nbdiff.max_drafts)",
            )


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
        key = _KEY_OF[name]
        raise OptionError(key, f"{key} must be {wanted}, got {reprlib.repr(value)}")


def inapplicable_to(algorithm: str) -> set[str]:
    """Options that a request cannot set with an algorithm, because they would change nothing."""
    rule = RULES[algorithm]
    return {"max_steps"} if rule.edits else _OF_EDITS | ({"threshold"} if rule.is_fixed else set())


def check_family(name: str, value: Any, family: Family) -> None:
    """Raise OptionError for what does not apply to the models of `family`."""
    if (reason := family.refusal(name, value)) is not None:
        raise OptionError(_KEY_OF[name], f"{_KEY_OF[name]}{reason}")


def check_mode(mode: str, tensor_parallel_size: int) -> None:
    """Raise OptionError for a mode that tensor parallelism rules out.

    What `auto` measures differs from rank to rank, and so would their choices.
    """
    if mode == "auto" and tensor_parallel_size > 1:
        message = "nbdiff_mode=auto measures time and needs --tensor-parallel-size 1"
        raise OptionError("nbdiff_mode", message)


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
    if not values:
        return config.defaults
    options = replace(_unresolved(config, values), **values)
    mode = options.mode
    inapplicable = INAPPLICABLE[mode]
    if options.algorithm == FREEDAVE:
        inapplicable = inapplicable - {"draft_steps"}
    for key, name in OPTION_KEYS.items():
        if name in values and name in inapplicable:
            raise OptionError(key, f"{key} does not apply to nbdiff_mode={mode}")
        if name in values and name in inapplicable_to(options.algorithm):
            raise OptionError(key, f"{key} does not apply to nbdiff_algorithm={options.algorithm}")
    check_mode(mode, config.tensor_parallel_size)
    return options.resolved()


def _unknown(key: str) -> OptionError:
    """The error for a key that nobody reads, with the option that may have been meant."""
    stem = key.removeprefix("nbdiff_").removeprefix("diffusion_")
    meant = difflib.get_close_matches(stem, _KEY_OF, n=1)
    hint = f"did you mean {_KEY_OF[meant[0]]}?" if meant else f"known: {', '.join(OPTION_KEYS)}"
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
    key = _KEY_OF[name]
    if allow.options is not None and name not in allow.options:
        raise OptionError(key, f"{key} is not allowed by this server (nbdiff.allow.options)")
    if barred:
        raise OptionError(key, f"{key}={value} is not allowed by this server (nbdiff.allow)")


def _unresolved(config: BlockDiffusionConfig, values: dict[str, Any]) -> RequestOptions:
    """Server defaults, with those that depend on an option the request sets left open again."""
    base = config.defaults
    if base.algorithm == FREEDAVE and values.get("mode", "diffusion") != "diffusion":
        base = replace(base, algorithm="confidence", threshold=None)
    if values.get("algorithm", base.algorithm) != base.algorithm:
        base = replace(base, threshold=None)
    if values.get("block_length", base.block_length) != base.block_length:
        base = replace(base, small_blocks=None)
    return base
