# SPDX-License-Identifier: Apache-2.0
"""What a family has no use for is refused by name, a request's options and the server's."""

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

import vllm_nbdiff
from tests.conftest import GOLDEN
from vllm_nbdiff.admission import validate_request, validate_room
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.engine_options import EngineOptions
from vllm_nbdiff.families.family import (
    FAST_DLLM,
    LLADA2,
    NBDIFF,
    NEMOTRON,
    SDAR,
    Family,
)
from vllm_nbdiff.request import parse_options
from vllm_nbdiff.request_options import RequestOptions


def config(family: Family, **more: Any) -> BlockDiffusionConfig:
    """A server of a model of `family`."""
    options = RequestOptions(
        algorithm=family.algorithms[0], sub_block_length=family.sub_block_length, **family.defaults
    )
    settings: dict[str, Any] = {"engine": EngineOptions(), "end_think_token_id": 9} | more
    return BlockDiffusionConfig(
        model_type="any",
        block_length=32,
        mask_token_id=7,
        vocab_size=100,
        tensor_parallel_size=1,
        defaults=options.resolved(),
        family=family,
        **settings,
    )


@pytest.mark.parametrize(
    ("family", "extra", "key"),
    [
        *((family, {"nbdiff_mode": mode}, "nbdiff_mode")
          for family in (SDAR, FAST_DLLM, LLADA2) for mode in ("verify", "ar", "auto")),
        *((family, {"nbdiff_algorithm": "edit"}, "nbdiff_algorithm")
          for family in (NBDIFF, NEMOTRON, SDAR, FAST_DLLM)),
        *((family, {"nbdiff_algorithm": "sequential"}, "nbdiff_algorithm")
          for family in (NBDIFF, NEMOTRON, FAST_DLLM, LLADA2)),
        *((family, {"nbdiff_algorithm": "freedave"}, "nbdiff_algorithm")
          for family in (NEMOTRON, SDAR, FAST_DLLM, LLADA2)),
        *((family, {"nbdiff_block_length": 16}, "nbdiff_block_length")
          for family in (SDAR, FAST_DLLM, LLADA2)),
        *((family, {"nbdiff_small_blocks": 2}, "nbdiff_small_blocks") for family in (SDAR, LLADA2)),
        *((family, {"nbdiff_block_cache": 1}, "nbdiff_block_cache") for family in (SDAR, LLADA2)),
        *((family, {"nbdiff_fused_commit": 1}, "nbdiff_fused_commit")
          for family in (NEMOTRON, FAST_DLLM)),
        (SDAR, {"nbdiff_editing_threshold": 0.5}, "nbdiff_editing_threshold"),
        (NBDIFF, {"nbdiff_max_post_steps": 1}, "nbdiff_max_post_steps"),
        # Of another algorithm than the one that is asked for.
        (LLADA2, {"nbdiff_editing_threshold": 0.5}, "nbdiff_editing_threshold"),
        (LLADA2, {"nbdiff_algorithm": "edit", "diffusion_max_steps": 3}, "diffusion_max_steps"),
        (SDAR, {"nbdiff_algorithm": "sequential", "nbdiff_threshold": 0.5}, "nbdiff_threshold"),
        # Out of range.
        (LLADA2, {"nbdiff_algorithm": "edit", "nbdiff_editing_threshold": 1.5},
         "nbdiff_editing_threshold"),
        (LLADA2, {"nbdiff_algorithm": "edit", "nbdiff_max_post_steps": -1},
         "nbdiff_max_post_steps"),
        (SDAR, {"nbdiff_threshold": 1.5}, "nbdiff_threshold"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_by_name(family: Family, extra: dict[str, Any], key: str) -> None:
    with pytest.raises(VLLMValidationError, match=key) as error:
        validate_request(SamplingParams(extra_args=extra), [1, 2], config(family))
    assert error.value.parameter == key


def test_what_applies_is_taken() -> None:
    edit = {"nbdiff_algorithm": "edit", "nbdiff_max_post_steps": 0}
    options = parse_options(edit, config(LLADA2))
    assert (options.threshold, options.editing_threshold, options.max_post_steps) == (0.7, 0.5, 0)
    assert parse_options(None, config(LLADA2)).threshold == 0.95
    assert parse_options({"nbdiff_algorithm": "confidence"}, config(SDAR)).small_blocks == 1
    assert parse_options(None, config(FAST_DLLM)).small_blocks == 4
    bounded = {"nbdiff_algorithm": "entropy_bounded", "nbdiff_threshold": 2.0}
    assert parse_options(bounded, config(SDAR)).threshold == 2.0


@pytest.mark.parametrize("family", [NBDIFF, SDAR, FAST_DLLM, LLADA2])
def test_thinking_budgets(family: Family) -> None:
    budget = SamplingParams(thinking_token_budget=5)
    with pytest.raises(VLLMValidationError, match="not supported") as error:
        validate_request(budget, [1], config(family))
    assert error.value.parameter == "thinking_token_budget"
    validate_request(budget, [1], config(NEMOTRON))
    with pytest.raises(VLLMValidationError, match="--reasoning-parser"):
        validate_request(budget, [1], config(NEMOTRON, end_think_token_id=None))


def test_room_for_the_block_that_a_prompt_ends_in() -> None:
    static = {"engine": EngineOptions(static_shapes=True)}
    for family, length in ((SDAR, 68), (SDAR, 64), (SDAR, 96), (NBDIFF, 99)):
        validate_room(length, config(family, **static), 100)
    validate_room(99, config(SDAR, engine=EngineOptions(static_shapes=False)), 100)
    with pytest.raises(VLLMValidationError, match="69 tokens"):
        validate_room(69, config(SDAR, **static), 100)


def start(checkpoint: Path, block_length: int, **arguments: Any) -> Any:
    vllm_nbdiff.register()
    return EngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        dtype="float32",
        hf_overrides={"block_length": block_length},
        **arguments,
    ).create_engine_config()


def test_pages_hold_whole_blocks() -> None:
    sdar, nemotron = (GOLDEN / name / "tiny_a" for name in ("sdar", "nemotron_labs_diffusion"))
    assert start(sdar, 8).cache_config.block_size == 128
    assert start(sdar, 24).cache_config.block_size == 384
    assert start(sdar, 32, block_size=64).cache_config.block_size == 64
    assert start(nemotron, 24, block_size=32).cache_config.block_size == 32
    with pytest.raises(ValueError, match=r"--block-size \(32\) must be a multiple .* \(24\)"):
        start(sdar, 24, block_size=32)


@pytest.mark.parametrize(
    ("nbdiff", "said"),
    [
        ({"mode": "ar"}, "nbdiff_mode=ar needs a causal context"),
        ({"small_blocks": 2}, "nbdiff_small_blocks does not apply to SDAR"),
        ({"algorithm": "edit"}, "nbdiff_algorithm=edit does not apply to SDAR"),
    ],
)
def test_server_wide_defaults(nbdiff: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        start(GOLDEN / "sdar" / "tiny_a", 8, additional_config={"nbdiff": nbdiff})
