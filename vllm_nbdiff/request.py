# SPDX-License-Identifier: Apache-2.0
"""Per-request options: parsed, validated, typed.

Read from `SamplingParams(extra_args=...)`, over HTTP `vllm_xargs`. Import-light: used by the
frontend at admission and by the workers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_nbdiff.decoding.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.sampling_params import SamplingParams

    from vllm_nbdiff.config import BlockDiffusionConfig

MODES = ("diffusion", "verify", "ar", "auto")
DEFAULT_SUB_BLOCK_LENGTH = 8
DEFAULT_DRAFT_LENGTH = 16
DEFAULT_DRAFT_STEPS = 1
DEFAULT_FREEDAVE_STEPS = 4
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
    "nbdiff_fused_commit": "fused_commit",
    "nbdiff_block_cache": "block_cache",
    "diffusion_max_steps": "max_steps",
}

_OF_DIFFUSION = {"small_blocks", "block_length", "max_steps", "block_cache"}
_OF_VERIFY = {"draft_length", "draft_steps"}
_OF_DRAFTS = {"algorithm", "threshold", "fused_commit"}
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
    """Number of sub-blocks a block is filled in, left to right. Default: sub-blocks of 8."""
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
    """`verify`: denoise steps that draft a block, default 1. Algorithm `freedave`: steps that a
    forward may do, default 4."""
    fused_commit: bool = False
    """Commit a block in the forward that first denoises the next one, with its seed guessed; a
    wrong guess costs rows, never tokens."""
    block_cache: bool = False
    """Between the first step of a sub-block and the next sub-block, compute only its own rows and
    reuse the KV of the rest of the canvas (Fast-dLLM v2); changes the text."""

    @property
    def draft_width(self) -> int:
        """Tokens that a verified draft has at most, the seed included; 1 is AR decoding."""
        if self.mode == "ar":
            return 1
        return min(self.draft_length or DEFAULT_DRAFT_LENGTH, self.block_length)

    @property
    def num_drafts(self) -> int:
        """Canvases that a denoise forward may compute beside the request's own (FreeDave)."""
        if self.algorithm != FREEDAVE:
            return 0
        assert self.small_blocks is not None
        steps = self.draft_steps or DEFAULT_FREEDAVE_STEPS
        return min(steps - 1, self.block_length // self.small_blocks)

    def resolved(self) -> RequestOptions:
        """The same options with every dependent default filled in and checked together.

        Raises ValueError when `block_length` is not divisible by `small_blocks`, the threshold is
        beyond the algorithm's range, or the algorithm does not combine with another option.
        """
        threshold, small_blocks = self.threshold, self.small_blocks
        rule = RULES[self.algorithm]
        if threshold is None:
            threshold = rule.threshold
        if rule.limit is not None and threshold > rule.limit:
            raise ValueError(
                f"nbdiff_threshold must be a number in [0, {rule.limit:g}] for {self.algorithm}, "
                f"got {threshold!r}"
            )
        if small_blocks is None:
            whole = self.block_length % DEFAULT_SUB_BLOCK_LENGTH == 0
            small_blocks = self.block_length // DEFAULT_SUB_BLOCK_LENGTH if whole else 1
        if self.block_length % small_blocks:
            raise ValueError(
                f"nbdiff_small_blocks: block length {self.block_length} is not divisible by "
                f"{small_blocks}"
            )
        resolved = replace(self, threshold=float(threshold), small_blocks=small_blocks)
        if self.algorithm == FREEDAVE:
            for key, name in OPTION_KEYS.items():
                value = getattr(resolved, name)
                if name in _OF_FREEDAVE and value != _OF_FREEDAVE[name]:
                    raise ValueError(f"{key}={value} does not apply to nbdiff_algorithm={FREEDAVE}")
        return resolved


def check_option(name: str, value: Any, max_block_length: int) -> None:
    """Check the type and range of one option. Raises ValueError naming its request key."""
    key = next(k for k, field in OPTION_KEYS.items() if field == name)
    if name == "algorithm" or name == "mode":
        allowed = tuple(RULES) if name == "algorithm" else MODES
        if value not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    elif name in ("fused_commit", "block_cache"):
        if value not in (0, 1):
            raise ValueError(f"{key} must be 0 or 1, got {value!r}")
    elif name == "threshold":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not value >= 0:
            raise ValueError(f"{key} must be a number of at least 0, got {value!r}")
    else:
        lengths = ("block_length", "small_blocks", "draft_length")
        limit = max_block_length if name in lengths else None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < 1 or (limit is not None and value > limit):
            top = f" and at most {limit}" if limit is not None else ""
            raise ValueError(f"{key} must be an integer of at least 1{top}, got {value!r}")


def check_mode(mode: str, tensor_parallel_size: int) -> None:
    """Raise ValueError for a mode that tensor parallelism rules out.

    What `auto` measures differs from rank to rank, and so would their choices.
    """
    if mode == "auto" and tensor_parallel_size > 1:
        raise ValueError("nbdiff_mode=auto measures time and needs --tensor-parallel-size 1")


def parse_options(
    extra_args: dict[str, Any] | None, config: BlockDiffusionConfig
) -> RequestOptions:
    """The options of one request. Raises ValueError naming the offending key."""
    values: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        name = OPTION_KEYS.get(key)
        if name is None:
            if key.startswith(("nbdiff_", "diffusion_")):
                raise ValueError(f"unknown option {key}; known: {', '.join(OPTION_KEYS)}")
            continue
        check_option(name, value, config.block_length)
        values[name] = value
    if not values:
        return config.defaults
    options = replace(_unresolved(config, values), **values)
    mode = options.mode
    inapplicable = INAPPLICABLE[mode]
    if options.algorithm == FREEDAVE:
        inapplicable = inapplicable - {"draft_steps"}
    for key, name in OPTION_KEYS.items():
        if name in values and name in inapplicable:
            raise ValueError(f"{key} does not apply to nbdiff_mode={mode}")
    check_mode(mode, config.tensor_parallel_size)
    return options.resolved()


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


def refuse_unsupported(params: SamplingParams) -> str | None:
    """The name of a standard sampling parameter that block diffusion cannot honour, or None."""
    unsupported = {
        "logprobs": params.logprobs is not None,
        "logprob_token_ids": params.logprob_token_ids is not None,
        "prompt_logprobs": params.prompt_logprobs is not None,
        "prompt_logprob_token_ids": params.prompt_logprob_token_ids is not None,
        "structured_outputs": params.structured_outputs is not None,
        "thinking_token_budget": params.thinking_token_budget is not None,
        "trace_decode_token_ids": bool(params.trace_decode_token_ids),
    }
    return next((name for name, used in unsupported.items() if used), None)


def validate_request(
    params: SamplingParams, prompt_token_ids: Sequence[int] | None, config: BlockDiffusionConfig
) -> None:
    """Check one request at admission.

    Raises VLLMValidationError (HTTP 400) naming the parameter.
    """
    from vllm.exceptions import VLLMValidationError

    if (name := refuse_unsupported(params)) is not None:
        raise VLLMValidationError(
            f"{name} is not supported with block-diffusion models", parameter=name
        )
    try:
        options = parse_options(params.extra_args, config)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="extra_args") from None
    if options.algorithm == FREEDAVE and params.temperature > 0:
        raise VLLMValidationError(
            f"nbdiff_algorithm={FREEDAVE} is greedy and needs temperature=0, "
            f"got {params.temperature}",
            parameter="temperature",
        )
    if params.allowed_token_ids and set(params.allowed_token_ids) == {config.mask_token_id}:
        raise VLLMValidationError(
            f"allowed_token_ids holds only the mask token (id {config.mask_token_id}), which is "
            "never generated",
            parameter="allowed_token_ids",
        )
    if config.engine.allow_mask_token_in_prompt or prompt_token_ids is None:
        return
    if config.mask_token_id in prompt_token_ids:
        raise VLLMValidationError(
            f"the prompt contains the mask token (id {config.mask_token_id}); to allow it, start "
            'the server with --additional-config \'{"nbdiff": {"allow_mask_token_in_prompt": '
            "true}}'",
            parameter="prompt",
        )
