# SPDX-License-Identifier: Apache-2.0
"""What is set in the environment of an engine's processes on a CPU."""

import os
from pathlib import Path

import pytest
import torch

from vllm_nbdiff import environment


def test_what_is_set_already_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in "0", "1":
        monkeypatch.setenv("VLLM_USE_AOT_COMPILE", given)
        environment.set_cpu_environment()
        assert os.environ["VLLM_USE_AOT_COMPILE"] == given
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE")
    environment.set_cpu_environment()
    assert os.environ["VLLM_USE_AOT_COMPILE"] == "0"


def test_intel_openmp_is_preloaded_beside_what_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment.sys, "prefix", str(tmp_path))
    library = tmp_path / "lib" / "libiomp5.so"
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    environment._preload_intel_openmp()
    assert os.environ["LD_PRELOAD"] == "other.so"
    library.parent.mkdir()
    library.touch()
    environment._preload_intel_openmp()
    assert os.environ["LD_PRELOAD"] == f"other.so:{library}"
    monkeypatch.setenv("LD_PRELOAD", "libgomp.so.1")
    environment._preload_intel_openmp()
    assert os.environ["LD_PRELOAD"] == "libgomp.so.1"


def test_vllm_cannot_load_what_inductor_saves(tmp_path: Path) -> None:
    """Red: `_load_compiled_models` can go."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    compiled = torch.compile(double, fullgraph=True, backend="inductor")
    saved = str(tmp_path / "model")
    compiled.aot_compile(((torch.ones(3),), {})).save_compiled_function(saved)
    with open(saved, "rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    assert loaded(torch.ones(3)).tolist() == [2, 2, 2]
    assert not hasattr(loaded._artifacts.compiled_fn, "finalize_loading")
