# SPDX-License-Identifier: Apache-2.0
"""What a block-diffusion checkpoint is: family, block length, mask token, defaults.

Values come, first match wins, from `--additional-config '{"nbdiff": {...}}'` (defaults of the
request options only), the checkpoint's `generation_config.json` or the one that vLLM's
`--generation-config` names, if any, and the defaults of this module;
`block_length` and `mask_token_id` from `--hf-overrides`, the checkpoint's `config.json` (its
family's own name for the block length included), and what is known of the family.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from vllm_nbdiff.engine_options import EngineOptions, parse_engine_options
from vllm_nbdiff.families.family import NBDIFF, Family, family_of
from vllm_nbdiff.names import ARCHITECTURE
from vllm_nbdiff.request import check_family, check_option
from vllm_nbdiff.request_options import FREEDAVE, OPTION_KEYS, RequestOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MODEL_TYPES = ("PanguEmbedded", "llama", "qwen2", "qwen3")

_OVERRIDE = "set it with --hf-overrides '{\"%s\": N}' or in the checkpoint's config.json"


@dataclass(frozen=True)
class BlockDiffusionConfig:
    """The served model's block-diffusion settings."""

    model_type: str
    block_length: int
    mask_token_id: int
    vocab_size: int
    tensor_parallel_size: int
    defaults: RequestOptions
    engine: EngineOptions
    family: Family = NBDIFF
    end_think_token_id: int | None = None
    """What ends thinking where a budget for it is honoured and vLLM knows it as one token."""

    @property
    def static_shapes(self) -> bool:
        """Whether the shapes of a forward do not depend on data, as CUDA graphs need."""
        return _static_shapes(self.engine)

    @property
    def most_rows(self) -> int:
        """Rows that the widest canvas of a request has at least, where a schedule is one forward,
        or tokens that it may emit."""
        return self.block_length + (self.family.known_rows if self.static_shapes else 0)

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> BlockDiffusionConfig:
        """Read and check every setting. Raises ValueError naming the key and the fix."""
        model_config = vllm_config.model_config
        hf_config = model_config.hf_text_config
        vocab_size = model_config.get_vocab_size()
        family = family_of(model_config.architectures)
        assert family is not None, "only our architectures have the config hook"
        if ARCHITECTURE in family.models and hf_config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"{ARCHITECTURE} has no backbone for model_type={hf_config.model_type!r}; "
                f"supported: {', '.join(MODEL_TYPES)}"
            )
        block_length = _block_length(vllm_config, hf_config, family)
        additional = vllm_config.additional_config
        user = additional.get("nbdiff", {}) if isinstance(additional, dict) else {}
        if not isinstance(user, dict):
            raise ValueError(f"--additional-config: 'nbdiff' must be an object, got {user!r}")
        engine = parse_engine_options(user)
        return cls(
            model_type=hf_config.model_type,
            block_length=block_length,
            mask_token_id=_mask_token_id(hf_config, vocab_size, family),
            vocab_size=vocab_size,
            tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
            defaults=_request_defaults(user, engine, vllm_config, block_length, family),
            engine=engine,
            family=family,
            end_think_token_id=_end_think_token_id(vllm_config, family),
        )


def _static_shapes(engine: EngineOptions) -> bool:
    from vllm.platforms import current_platform

    wanted = engine.static_shapes
    return not current_platform.is_cpu() if wanted is None else wanted


def _block_length(vllm_config: VllmConfig, hf_config: Any, family: Family) -> int:
    key, value = "block_length", getattr(hf_config, "block_length", None)
    if value is None:
        key, value = family.block_length_key, getattr(hf_config, family.block_length_key, None)
    if value is None:
        value = family.block_length
    canvas = vllm_config.diffusion_config
    if canvas is not None and canvas.canvas_length is not None:
        value = canvas.canvas_length
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{key} must be a positive integer, got {value!r}; {_OVERRIDE % 'block_length'}"
        )
    return value


def _mask_token_id(hf_config: Any, vocab_size: int, family: Family) -> int:
    value = getattr(hf_config, "mask_token_id", None)
    if value is None:
        value = family.mask_token_ids.get(hf_config.model_type)
    if value is None:
        raise ValueError(f"mask_token_id is missing; {_OVERRIDE % 'mask_token_id'}")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ValueError(
            f"mask_token_id must be an integer in [0, {vocab_size}) (the vocabulary), "
            f"got {value!r}; {_OVERRIDE % 'mask_token_id'}"
        )
    return value


def _end_think_token_id(vllm_config: VllmConfig, family: Family) -> int | None:
    reasoning = vllm_config.reasoning_config
    ids = reasoning.reasoning_end_token_ids if reasoning is not None else None
    return ids[0] if family.thinking_budget and ids and len(ids) == 1 else None


def _request_defaults(
    user: dict[str, Any],
    engine: EngineOptions,
    vllm_config: VllmConfig,
    block_length: int,
    family: Family,
) -> RequestOptions:
    engine_names = {f.name for f in fields(EngineOptions)}
    request_names = set(OPTION_KEYS.values())
    if unknown := sorted(set(user) - engine_names - request_names):
        raise ValueError(
            f"--additional-config: unknown key nbdiff.{unknown[0]}; "
            f"known: {', '.join(sorted(engine_names | request_names))}"
        )
    model = vllm_config.model_config
    # `--generation-config vllm` asks for no defaults of the checkpoint.
    generation = {} if model.generation_config == "vllm" else model.try_get_generation_config()
    values = {k[len("nbdiff_") :]: v for k, v in generation.items() if k.startswith("nbdiff_")}
    if unknown := sorted(set(values) - request_names):
        raise ValueError(f"generation_config.json: unknown key nbdiff_{unknown[0]}")
    own = {k: v for k, v in user.items() if k in request_names}
    algorithm = values.get("algorithm", family.algorithms[0])
    if own.get("algorithm", algorithm) != algorithm:
        # The checkpoint's are of its own algorithm.
        values.pop("threshold", None)
        if FREEDAVE in (algorithm, own["algorithm"]):
            values.pop("draft_steps", None)
    values.update(own)
    canvas = vllm_config.diffusion_config
    if canvas is not None and canvas.max_denoising_steps is not None:
        values.setdefault("max_steps", canvas.max_denoising_steps)
    try:
        for name, value in values.items():
            check_option(name, value, block_length)
            check_family(name, value, family)
        known = {"algorithm": family.algorithms[0], **family.defaults}
        if values.get("algorithm", known["algorithm"]) != known["algorithm"]:
            known.pop("threshold", None)
        # Nothing is guessed there, but with static shapes every forward would have twice the rows.
        known["fused_commit"] = family.seed == "never" and not _static_shapes(engine)
        known |= {"block_length": block_length, "sub_block_length": family.sub_block_length}
        values = {**known, "max_drafts": engine.max_drafts, **values}
        options = RequestOptions(**values)
        if options.fan_out and options.algorithm != FREEDAVE:
            replace(options, mode="verify").resolved()  # what requests of that mode would get
        return options.resolved()
    except ValueError as error:
        raise ValueError(f"server-wide nbdiff defaults: {error}") from None
