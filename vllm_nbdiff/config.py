# SPDX-License-Identifier: Apache-2.0
"""What a block-diffusion checkpoint is: family, block length, mask token, defaults.

Values come, first match wins, from `--additional-config '{"nbdiff": {...}}'` (defaults of the
request options only), the checkpoint's `generation_config.json`, and the defaults of this module;
`block_length` and `mask_token_id` from the checkpoint's `config.json` and `--hf-overrides`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm_nbdiff.request import RequestOptions, check_mode, check_option

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

ARCHITECTURE = "NBDiffForCausalLM"
MODEL_CLASS = "vllm_nbdiff.families.nbdiff:NBDiffForCausalLM"
SCHEDULER = "vllm_nbdiff.engine.scheduler.make_scheduler"

DECODERS = ("host", "device")
ATTENTION_KERNELS = ("triton", "torch", "xformers")
MODEL_TYPES = ("PanguEmbedded", "llama", "qwen2", "qwen3")
DEFAULT_BLOCK_LENGTH = 32
# NBDiff-7B and openPangu-7B-Diffusion name neither in their config (demo.py of YuchuanTian/NBDiff).
PANGU_MASK_TOKEN_ID = 45830

_OVERRIDE = "set it with --hf-overrides '{\"%s\": N}' or in the checkpoint's config.json"


def is_block_diffusion(vllm_config: Any) -> bool:
    """Whether the served checkpoint is one of ours (a `VllmConfig` may lack a model)."""
    model_config = getattr(vllm_config, "model_config", None)
    return model_config is not None and ARCHITECTURE in (model_config.architectures or ())


@dataclass(frozen=True)
class EngineOptions:
    """Server-wide options of `--additional-config '{"nbdiff": {...}}'` that no request can set."""

    allow_mask_token_in_prompt: bool = False
    """Accept prompts that contain the mask token id."""
    max_steps_per_schedule: int | None = None
    """Forwards the worker runs before it returns to the scheduler; None: 16 on CPU, 1 elsewhere.
    Of requests that are decoded on the host."""
    decoder: str | None = None
    """`device`: forwards are decided by kernels, without a copy to the host between them; `host`:
    in numpy. None: `host` on CPU, else `device`."""
    attention_kernel: str | None = None
    """What the plugin's own attention backend runs: `triton`, the default, or for comparison
    `torch` or `xformers`."""


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

    @property
    def decoder(self) -> str:
        """Where forwards are decided: `host` or `device`."""
        from vllm.platforms import current_platform

        return self.engine.decoder or ("host" if current_platform.is_cpu() else "device")

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> BlockDiffusionConfig:
        """Read and check every setting. Raises ValueError naming the key and the fix."""
        model_config = vllm_config.model_config
        hf_config = model_config.hf_text_config
        vocab_size = model_config.get_vocab_size()
        if hf_config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"{ARCHITECTURE} has no backbone for model_type={hf_config.model_type!r}; "
                f"supported: {', '.join(MODEL_TYPES)}"
            )
        block_length = _block_length(vllm_config, hf_config)
        additional = vllm_config.additional_config
        user = additional.get("nbdiff", {}) if isinstance(additional, dict) else {}
        if not isinstance(user, dict):
            raise ValueError(f"--additional-config: 'nbdiff' must be an object, got {user!r}")
        engine = _engine_options(user)
        return cls(
            model_type=hf_config.model_type,
            block_length=block_length,
            mask_token_id=_mask_token_id(hf_config, vocab_size),
            vocab_size=vocab_size,
            tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
            defaults=_request_defaults(user, model_config, vllm_config, block_length),
            engine=engine,
        )


def _block_length(vllm_config: VllmConfig, hf_config: Any) -> int:
    value = getattr(hf_config, "block_length", None)
    if value is None:
        value = DEFAULT_BLOCK_LENGTH
    canvas = vllm_config.diffusion_config
    if canvas is not None and canvas.canvas_length is not None:
        value = canvas.canvas_length
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"block_length must be a positive integer, got {value!r}; {_OVERRIDE % 'block_length'}"
        )
    return value


def _mask_token_id(hf_config: Any, vocab_size: int) -> int:
    value = getattr(hf_config, "mask_token_id", None)
    if value is None and hf_config.model_type == "PanguEmbedded":
        value = PANGU_MASK_TOKEN_ID
    if value is None:
        raise ValueError(f"mask_token_id is missing; {_OVERRIDE % 'mask_token_id'}")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ValueError(
            f"mask_token_id must be an integer in [0, {vocab_size}) (the vocabulary), "
            f"got {value!r}; {_OVERRIDE % 'mask_token_id'}"
        )
    return value


def _engine_options(user: dict[str, Any]) -> EngineOptions:
    names = {f.name for f in fields(EngineOptions)}
    options = EngineOptions(**{k: v for k, v in user.items() if k in names})
    if not isinstance(options.allow_mask_token_in_prompt, bool):
        raise ValueError(
            "--additional-config: nbdiff.allow_mask_token_in_prompt must be true or false, "
            f"got {options.allow_mask_token_in_prompt!r}"
        )
    steps = options.max_steps_per_schedule
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(
            "--additional-config: nbdiff.max_steps_per_schedule must be a positive integer, "
            f"got {steps!r}"
        )
    choices = {"decoder": (None, *DECODERS), "attention_kernel": (None, *ATTENTION_KERNELS)}
    for name, known in choices.items():
        if (value := getattr(options, name)) not in known:
            raise ValueError(
                f"--additional-config: nbdiff.{name} must be one of "
                f"{', '.join(str(k) for k in known if k)}, got {value!r}"
            )
    return options


def _request_defaults(
    user: dict[str, Any],
    model_config: ModelConfig,
    vllm_config: VllmConfig,
    block_length: int,
) -> RequestOptions:
    engine_names = {f.name for f in fields(EngineOptions)}
    request_names = {f.name for f in fields(RequestOptions)}
    if unknown := sorted(set(user) - engine_names - request_names):
        raise ValueError(
            f"--additional-config: unknown key nbdiff.{unknown[0]}; "
            f"known: {', '.join(sorted(engine_names | request_names))}"
        )
    generation = model_config.try_get_generation_config()
    values = {k[len("nbdiff_") :]: v for k, v in generation.items() if k.startswith("nbdiff_")}
    if unknown := sorted(set(values) - request_names):
        raise ValueError(f"generation_config.json: unknown key nbdiff_{unknown[0]}")
    values.update({k: v for k, v in user.items() if k in request_names})
    canvas = vllm_config.diffusion_config
    if canvas is not None and canvas.max_denoising_steps is not None:
        values.setdefault("max_steps", canvas.max_denoising_steps)
    try:
        for name, value in values.items():
            check_option(name, value, block_length)
        options = RequestOptions(**{"block_length": block_length, **values}).resolved()
        check_mode(options.mode, vllm_config.parallel_config.tensor_parallel_size)
        return options
    except ValueError as error:
        raise ValueError(f"server-wide nbdiff defaults: {error}") from None


class NBDiffConfigHook:
    """vLLM's per-architecture config hook (`MODELS_CONFIG_MAP`)."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Nothing to change before the other configs exist."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the block-diffusion settings and set what the engine needs.

        `canvas_length` goes on `DiffusionConfig` only: on the HF config it would make vLLM treat
        the model as one that refuses temperature, seed and most other sampling parameters.
        """
        from vllm.config.diffusion import DiffusionConfig
        from vllm.logger import init_logger

        from vllm_nbdiff import startup

        logger = init_logger("vllm.nbdiff")
        config = BlockDiffusionConfig.from_vllm_config(vllm_config)
        startup.refuse_unsupported_features(vllm_config)
        canvas = vllm_config.diffusion_config
        vllm_config.diffusion_config = DiffusionConfig(
            canvas_length=config.block_length,
            max_denoising_steps=canvas.max_denoising_steps if canvas is not None else None,
        )
        scheduler = vllm_config.scheduler_config
        scheduler.scheduler_cls = SCHEDULER
        if scheduler.max_num_batched_tokens < config.block_length:
            raise ValueError(
                f"--max-num-batched-tokens ({scheduler.max_num_batched_tokens}) must hold one "
                f"whole block (block_length={config.block_length})"
            )
        if 0 < scheduler.long_prefill_token_threshold < config.block_length:
            raise ValueError(
                f"--long-prefill-token-threshold ({scheduler.long_prefill_token_threshold}) would "
                f"split blocks: it must be 0 or at least block_length={config.block_length}"
            )
        budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
        fits = max(budget // config.block_length, 1)
        if scheduler.max_num_seqs > fits:
            logger.info(
                "max_num_seqs lowered from %d to %d: max_num_batched_tokens (%d) must hold a whole "
                "block of %d tokens for every sequence",
                scheduler.max_num_seqs,
                fits,
                scheduler.max_num_batched_tokens,
                config.block_length,
            )
            scheduler.max_num_seqs = fits
        startup.set_platform_defaults(vllm_config, config)
