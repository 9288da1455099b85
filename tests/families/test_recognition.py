# SPDX-License-Identifier: Apache-2.0
"""What is read from a released config.json, what is known by name, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

import vllm_nbdiff
from tests.families.checkpoints import config_of
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.families.family import FAMILIES

VOCABULARY = 157184  # the largest of the released ones


def start(folder: Path, overrides: dict[str, Any] | None = None) -> VllmConfig:
    vllm_nbdiff.register()
    args = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        hf_overrides=overrides or {},
    )
    return args.create_engine_config()


def read(folder: Path, overrides: dict[str, Any] | None = None) -> BlockDiffusionConfig:
    return BlockDiffusionConfig.from_vllm_config(start(folder, overrides))


def changed(folder: Path, family: str, **keys: Any) -> Path:
    """A family's config.json in `folder` with other keys; None leaves one out."""
    config = config_of(family) | keys
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


RELEASED = {
    "nemotron_labs_diffusion": ("block_size", 32, 100),
    "sdar": ("block_size", 4, 151669),
    "fast_dllm_v2": ("bd_size", 32, 151665),
    "llada2": ("block_length", 32, 156895),
    "sdar_moe": ("block_size", 4, 151669),
    "stable_diffcoder": ("block_length", 4, 5),
}
"""By family: where a config holds the block length, its default, and the known mask."""


@pytest.mark.parametrize("family", RELEASED)
def test_block_length(family: str, tmp_path: Path) -> None:
    key, default, _ = RELEASED[family]
    assert read(changed(tmp_path, family, **{key: 16})).block_length == 16
    assert read(tmp_path, {"block_length": 8}).block_length == 8
    assert read(changed(tmp_path, family, **{key: None})).block_length == default
    with pytest.raises(ValueError, match=f"{key} must be a positive integer, got 0"):
        read(changed(tmp_path, family, **{key: 0}))


@pytest.mark.parametrize("family", RELEASED)
def test_mask(family: str, tmp_path: Path) -> None:
    *_, known = RELEASED[family]
    assert read(changed(tmp_path, family, mask_token_id=7)).mask_token_id == 7
    without = changed(tmp_path, family, mask_token_id=None, vocab_size=VOCABULARY)
    assert read(without).mask_token_id == known
    with pytest.raises(ValueError, match=r"mask_token_id must be an integer in \[0, 64\)"):
        read(changed(tmp_path, family, mask_token_id=64, vocab_size=64))


@pytest.mark.parametrize("family", RELEASED)
def test_remote_code_is_not_run(family: str, tmp_path: Path) -> None:
    """The released config.json names a class beside the weights, which is not there here."""
    remote = {"AutoConfig": "configuration.Config", "AutoModel": "modeling.Model"}
    assert read(changed(tmp_path, family, auto_map=remote)).block_length


def test_no_window_where_a_model_reads_none(tmp_path: Path) -> None:
    """LLaDA2 names a window beside `use_sliding_window: false`; vLLM reads the length alone."""
    assert start(changed(tmp_path, "llada2", sliding_window=16)).cache_config.sliding_window is None


def test_another_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expert_capacity: LLaDA2\.2 chooses experts by block"):
        read(changed(tmp_path, "llada2", expert_capacity=48))


def test_no_architecture_is_in_two_families() -> None:
    names = [name for family in FAMILIES for name in family.models]
    assert len(names) == len(set(names))
