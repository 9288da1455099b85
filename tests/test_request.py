# SPDX-License-Identifier: Apache-2.0
"""Per-request options: parsed, defaulted, and refused by name."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_nbdiff.admission import validate_request
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.engine_options import Allowed, EngineOptions
from vllm_nbdiff.refusal import OptionError
from vllm_nbdiff.request import parse_options
from vllm_nbdiff.request_options import RequestOptions

VOCAB, MASK = 100, 7


def config(engine: EngineOptions | None = None, **defaults: Any) -> BlockDiffusionConfig:
    """A server with these defaults of the request options."""
    engine = engine or EngineOptions()
    return BlockDiffusionConfig(
        model_type="llama",
        block_length=32,
        mask_token_id=MASK,
        vocab_size=VOCAB,
        tensor_parallel_size=2,
        defaults=RequestOptions(max_drafts=engine.max_drafts, **defaults).resolved(),
        engine=engine,
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


@pytest.mark.parametrize("option", [{"nbdiff_threshold": 0.5}, {"nbdiff_algorithm": "entropy"}])
def test_one_step_drafts_by_no_rule(option: dict[str, Any]) -> None:
    """The whole draft, whatever is likely."""
    verify = {"nbdiff_mode": "verify"}
    for steps in ({}, {"nbdiff_draft_steps": 1}):
        with pytest.raises(ValueError, match="mode=verify with nbdiff_draft_steps 1"):
            parse_options(verify | steps | option, config())
    several = parse_options(verify | option | {"nbdiff_draft_steps": 2}, config())
    assert several.verify_steps == 2


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
        with pytest.raises(VLLMValidationError, match=r"temperature must be 0 .*freedave") as error:
            validate_request(SamplingParams(temperature=0.5, extra_args=extra), [1], served)
        assert error.value.parameter == "temperature"


def test_freedave_among_the_defaults() -> None:
    def drafts(served: BlockDiffusionConfig, **extra: Any) -> int:
        return parse_options(extra, served).num_drafts

    assert drafts(config(), **FREEDAVE) == 3
    assert drafts(config(), **FREEDAVE, nbdiff_draft_steps=1) == 0
    # No more than a sub-block has positions.
    assert drafts(config(), **FREEDAVE, nbdiff_draft_steps=99) == 8
    # The server's draft steps are those of its own algorithm, here of `verify`.
    assert drafts(config(draft_steps=2), **FREEDAVE) == 3
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


def test_canvases_beside_a_requests_own_are_limited() -> None:
    served = config(EngineOptions(max_drafts=2))
    # The default asks for as many as there may be, a request is refused.
    assert parse_options(FREEDAVE, served).num_drafts == 2
    assert parse_options({**FREEDAVE, "nbdiff_draft_steps": 3}, served).num_drafts == 2
    with pytest.raises(OptionError, match=r"draft_steps=4 drafts 3 .* allows 2") as error:
        parse_options({**FREEDAVE, "nbdiff_draft_steps": 4}, served)
    assert error.value.key == "nbdiff_draft_steps"
    assert parse_options(FREEDAVE, config(EngineOptions(max_drafts=0))).num_drafts == 0
    # By default 8, whatever the sub-blocks.
    wide = {**FREEDAVE, "nbdiff_small_blocks": 1, "nbdiff_draft_steps": 9}
    assert parse_options(wide, config()).num_drafts == 8
    with pytest.raises(OptionError, match="nbdiff_draft_steps=10 drafts 9"):
        parse_options({**wide, "nbdiff_draft_steps": 10}, config())
    with pytest.raises(OptionError, match="nbdiff_draft_steps=4 drafts 3"):
        config(EngineOptions(max_drafts=2), algorithm="freedave", draft_steps=4)


def test_draft_steps_of_a_mode_do_not_leak_into_the_other() -> None:
    served = config(algorithm="freedave", draft_steps=6)
    assert parse_options({"nbdiff_mode": "verify"}, served).verify_steps == 1
    for mode in ("diffusion", "ar", "auto"):
        served = config(EngineOptions(max_drafts=1), mode=mode, draft_steps=6)
        request = {**FREEDAVE, "nbdiff_mode": "diffusion"}
        assert parse_options(request, served).num_drafts == 1
        assert parse_options({"nbdiff_mode": "verify"}, served).verify_steps == 6
    served = config(mode="verify", draft_steps=6)
    with pytest.raises(OptionError, match=r"nbdiff_mode=verify does not apply to .*freedave"):
        parse_options(FREEDAVE, config(mode="verify"))
    assert parse_options({**FREEDAVE, "nbdiff_mode": "diffusion"}, served).num_drafts == 3
    served = config(EngineOptions(max_drafts=1), algorithm="freedave")
    assert served.defaults.num_drafts == 1
    assert parse_options({"nbdiff_mode": "verify"}, served).verify_steps == 1
    assert (
        parse_options({"nbdiff_mode": "verify", "nbdiff_draft_steps": 3}, served).verify_steps == 3
    )


def test_keys_that_vllm_reads_pass() -> None:
    """Of the type that it takes unseen."""
    kinds: dict[str, Any] = {"kv_transfer_params": {}, "ec_transfer_params": {"a": 1}}
    kinds |= {"kv_cache_report_mode": "full", "session_id": "abc"}
    for key, value in kinds.items():
        for given in (value, None):
            assert parse_options({key: given}, config()) == config().defaults
        for wrong in (["a"], 1):
            with pytest.raises(ValueError, match=f"{key} must be a"):
                parse_options({key: wrong}, config())


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("threshold", "nbdiff_threshold"),
        ("mode", "nbdiff_mode"),
        ("max_steps", "diffusion_max_steps"),
        ("nbdiff_treshold", "nbdiff_threshold"),
        ("nbdiff_max_steps", "diffusion_max_steps"),
        ("colour", None),
        ("", None),
        ("x" * 100_000, None),
    ],
)
def test_keys_that_nobody_reads_are_refused(key: str, meant: str | None) -> None:
    with pytest.raises(VLLMValidationError) as error:
        validate_request(SamplingParams(extra_args={key: 0.1}), [1], config())
    said = str(error.value)
    assert f"unknown option {key[:64]}" in said and len(said) < 600
    assert (error.value.parameter or "").startswith(key[:64])
    assert (f"did you mean {meant}?" in said) if meant else ("did you mean" not in said)


def test_what_the_operator_allows() -> None:
    allow = Allowed(modes=("verify",), algorithms=("entropy",), options=("mode", "algorithm"))
    served = config(EngineOptions(allow=allow))
    for extra in (
        {"nbdiff_mode": "verify"},
        {"nbdiff_algorithm": "entropy"},
        {"nbdiff_mode": "diffusion", "nbdiff_algorithm": "confidence"},  # the defaults
    ):
        parse_options(extra, served)
    for key, value in [
        ("nbdiff_mode", "ar"),
        ("nbdiff_algorithm", "freedave"),
        ("nbdiff_threshold", 0.5),
    ]:
        with pytest.raises(VLLMValidationError, match="not allowed by this server") as error:
            validate_request(SamplingParams(extra_args={key: value}), [1], served)
        assert error.value.parameter == key
    only_verify = config(EngineOptions(allow=Allowed(modes=("verify",))))
    assert parse_options({"nbdiff_threshold": 0.5}, only_verify).threshold == 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nbdiff_algorithm", "topk_margin"),
        ("nbdiff_algorithm", 3),
        ("nbdiff_mode", "speculate"),
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
