# SPDX-License-Identifier: Apache-2.0
"""Per-request options: parsed, defaulted, and refused by name."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_nbdiff.config import BlockDiffusionConfig, EngineOptions
from vllm_nbdiff.request import RequestOptions, parse_options, validate_request


def config(**defaults: Any) -> BlockDiffusionConfig:
    return BlockDiffusionConfig(
        model_type="llama",
        block_length=32,
        mask_token_id=7,
        vocab_size=100,
        tensor_parallel_size=2,
        defaults=RequestOptions(**defaults).resolved(),
        engine=EngineOptions(),
    )


def test_defaults() -> None:
    options = parse_options(None, config())
    assert (options.algorithm, options.threshold, options.small_blocks) == ("confidence", 0.9, 4)
    assert (options.block_length, options.max_steps, options.mode) == (32, None, "diffusion")


def test_dependent_defaults_follow_what_the_request_sets() -> None:
    served = config(threshold=0.8, small_blocks=2)
    assert parse_options({"nbdiff_algorithm": "entropy"}, served).threshold == 1
    assert parse_options({"nbdiff_block_length": 16}, served).small_blocks == 2
    assert parse_options({"nbdiff_block_length": 12}, served).small_blocks == 1
    assert parse_options({"nbdiff_small_blocks": 8}, served).threshold == 0.8


@pytest.mark.parametrize(
    ("mode", "key"),
    [("ar", "nbdiff_threshold"), ("ar", "nbdiff_draft_steps"), ("verify", "nbdiff_small_blocks")],
)
def test_options_that_change_nothing_are_refused(mode: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} does not apply to nbdiff_mode={mode}"):
        parse_options({"nbdiff_mode": mode, key: 1}, config())


def test_thresholds_belong_to_their_rule() -> None:
    def threshold(algorithm: str, **extra: float) -> float | None:
        options = parse_options({"nbdiff_algorithm": algorithm, **extra}, config())
        return options.threshold

    assert threshold("factor") == 1 and threshold("entropy_bound") == 0.1
    assert threshold("factor", nbdiff_threshold=1.5) == 1.5
    with pytest.raises(ValueError, match=r"nbdiff_threshold .* for margin"):
        threshold("margin", nbdiff_threshold=1.5)


FREEDAVE = {"nbdiff_algorithm": "freedave"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nbdiff_threshold", 0.9),
        ("diffusion_max_steps", 4),
        ("nbdiff_fused_commit", 1),
        ("nbdiff_block_cache", 1),
        ("nbdiff_mode", "verify"),
        ("nbdiff_mode", "ar"),
        ("nbdiff_draft_length", 8),
        ("nbdiff_draft_steps", 0),
    ],
)
def test_freedave_refuses_what_it_cannot_honour(key: str, value: Any) -> None:
    params = SamplingParams(temperature=0, extra_args={**FREEDAVE, key: value})
    with pytest.raises(VLLMValidationError, match=key if value != "ar" else "nbdiff_algorithm"):
        validate_request(params, [1, 2], config())


def test_freedave_is_greedy() -> None:
    validate_request(SamplingParams(temperature=0, extra_args=FREEDAVE), [1], config())
    for served, extra in [(config(), FREEDAVE), (config(algorithm="freedave"), None)]:
        with pytest.raises(VLLMValidationError, match=r"freedave .* temperature=0") as error:
            validate_request(SamplingParams(temperature=0.5, extra_args=extra), [1], served)
        assert error.value.parameter == "temperature"


def test_freedave_among_the_defaults() -> None:
    def drafts(served: BlockDiffusionConfig, **extra: Any) -> int:
        return parse_options(extra, served).num_drafts

    assert drafts(config(), **FREEDAVE) == 3
    assert drafts(config(), **FREEDAVE, nbdiff_draft_steps=1) == 0
    # No more than a sub-block has positions.
    assert drafts(config(), **FREEDAVE, nbdiff_draft_steps=99) == 8
    assert drafts(config(draft_steps=2), **FREEDAVE) == 1
    assert drafts(config(threshold=0.5), **FREEDAVE) == 3
    served = config(algorithm="freedave", draft_steps=6)
    assert drafts(served) == 5 and drafts(served, nbdiff_algorithm="entropy") == 0
    assert parse_options({"nbdiff_mode": "ar"}, served).algorithm == "confidence"
    with pytest.raises(ValueError, match="nbdiff_draft_steps does not apply"):
        parse_options({"nbdiff_algorithm": "entropy", "nbdiff_draft_steps": 2}, served)
    assert drafts(config(fused_commit=True), **FREEDAVE, nbdiff_fused_commit=0) == 3
    with pytest.raises(ValueError, match=r"nbdiff_fused_commit=True .*freedave"):
        parse_options(FREEDAVE, config(fused_commit=True))
    with pytest.raises(ValueError, match=r"diffusion_max_steps=8 .*freedave"):
        config(algorithm="freedave", max_steps=8)


def test_other_extra_args_pass() -> None:
    assert parse_options({"kv_transfer_params": {}}, config()) == config().defaults


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nbdiff_algorithm", "topk_margin"),
        ("nbdiff_algorithm", 3),
        ("nbdiff_mode", "speculate"),
        ("nbdiff_mode", "auto"),  # with tensor parallelism
        ("nbdiff_draft_length", 33),
        ("nbdiff_draft_length", 8),  # without verification
        ("nbdiff_fused_commit", 2),
        ("nbdiff_block_cache", "yes"),
        ("nbdiff_threshold", 1.5),
        ("nbdiff_threshold", -0.1),
        ("nbdiff_threshold", "0.9"),
        ("nbdiff_threshold", True),
        ("nbdiff_small_blocks", 0),
        ("nbdiff_small_blocks", 3),
        ("nbdiff_small_blocks", 2.0),
        ("nbdiff_block_length", 64),
        ("nbdiff_block_length", [8]),
        ("diffusion_max_steps", 0),
        ("diffusion_max_steps", True),
        ("diffusion_pinned", [1]),
        ("nbdiff_temperature", 1),
    ],
)
def test_bad_options_are_refused_by_name(key: str, value: Any) -> None:
    params = SamplingParams(extra_args={key: value})
    with pytest.raises(VLLMValidationError, match=key):
        validate_request(params, [1, 2], config())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("logprobs", {"logprobs": 1}),
        ("logprobs", {"logprobs": 0}),
        ("prompt_logprobs", {"prompt_logprobs": 1}),
    ],
)
def test_unsupported_parameters_are_refused_by_name(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError, match=name) as error:
        validate_request(SamplingParams(**arguments), [1, 2], config())
    assert error.value.parameter == name


def test_only_the_mask_token_allowed() -> None:
    with pytest.raises(VLLMValidationError, match="allowed_token_ids"):
        validate_request(SamplingParams(allowed_token_ids=[7]), [1], config())
    validate_request(SamplingParams(allowed_token_ids=[7, 8]), [1], config())


def test_mask_token_in_the_prompt() -> None:
    with pytest.raises(VLLMValidationError, match="mask token"):
        validate_request(SamplingParams(), [1, 7, 2], config())
    validate_request(SamplingParams(), [1, 2], config())
