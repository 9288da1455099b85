# SPDX-License-Identifier: Apache-2.0
"""The options of one request: names, defaults, and what follows from them together."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_nbdiff.decoding.rules import RULES
from vllm_nbdiff.families.family import NBDIFF
from vllm_nbdiff.refusal import OptionError

MODES = ("diffusion", "verify", "ar", "auto")
DEFAULT_DRAFT_LENGTH = 16
DEFAULT_DRAFT_STEPS = 1
DEFAULT_FREEDAVE_STEPS = 4
DEFAULT_FAN_OUT = 0
DEFAULT_MAX_DRAFTS = 8
DEFAULT_EDITING_THRESHOLD = 0.5
DEFAULT_MAX_POST_STEPS = 16
FREEDAVE = "freedave"

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
KEY_OF = {name: key for key, name in OPTION_KEYS.items()}
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
    def drafts_reading(self) -> bool:
        """Whether drafts are made in the forwards that read text, not in some of their own."""
        drafts = self.mode in ("verify", "auto") and self.draft_width > 1
        return drafts and not self.fused_commit and self.verify_steps == 1

    @property
    def break_points(self) -> int:
        """Places at which a verified draft may break off for which the next one is made in the same
        forward, at most; 0: a forward reads what follows, and drafts behind it."""
        if not self.drafts_reading:
            return 0
        most = DEFAULT_FAN_OUT if self.fan_out is None else self.fan_out
        return min(most, self.draft_width, self.max_drafts)

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
        several = self.fused_commit or self.verify_steps > 1
        if self.fan_out and self.mode == "verify" and several:
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
