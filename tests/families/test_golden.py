# SPDX-License-Identifier: Apache-2.0
"""Greedy output is that of each family's own code, token for token.

One table for all: a row a family, everything else is in its golden cases. The names of options are
those of the golden READMEs.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from tests.conftest import GOLDEN, counter, tokens_of
from tests.families.engines import serve
from vllm_nbdiff.config import BlockDiffusionConfig

FAMILIES = {
    "nemotron_labs_diffusion": (4, 8, 16, 32),
    "sdar": (4, 8, 16, 32),
    "fast_dllm_v2": (8, 16, 32),
    "llada2": (8, 16, 32),
}
"""By the name of its golden cases: the block lengths they are of."""

ALGORITHMS = {
    "confidence_threshold": "confidence",
    "origin": "confidence",
    "llada2_confidence_threshold": "low_confidence_dynamic",
    "llada2_edit": "edit",
}
FIELDS = {
    "small_blocks": "nbdiff_small_blocks",
    "block_cache": "nbdiff_block_cache",
    "editing_threshold": "nbdiff_editing_threshold",
    "max_post_steps": "nbdiff_max_post_steps",
    "steps": "diffusion_max_steps",
    "threshold": "nbdiff_threshold",
    "entropy_bound": "nbdiff_threshold",
}

END_OF_THINKING = 77
"""Of every case with a budget."""

CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 64}
# No chunk of a prompt fills the budget where chunks are whole blocks.
UNEVEN: dict[str, Any] = {"max_num_batched_tokens": 61, "enable_prefix_caching": False}
WHOLE: dict[str, Any] = {"max_num_batched_tokens": 8192, "enable_prefix_caching": False}
# Too few pages for all requests: some are preempted and computed again.
PREEMPTED: dict[str, Any] = {
    "max_model_len": 320,
    "num_gpu_blocks_override": 14,
    "block_size": 32,
}
ENGINES = {
    **{(length, "chunked"): CHUNKED for length in (4, 8, 16, 32)},
    **{(length, "preempted"): PREEMPTED for length in (8, 32)},
    (16, "uneven"): UNEVEN,
    (8, "whole"): WHOLE,
}
SHAPES = {"dynamic": False, "static": True}
# Each family meets each of its lengths, each way to schedule, and both shapes of forwards.
SELECTED = [
    ("nemotron_labs_diffusion", 4, "chunked", "static"),
    ("nemotron_labs_diffusion", 8, "whole", "dynamic"),
    ("nemotron_labs_diffusion", 16, "uneven", "static"),
    ("nemotron_labs_diffusion", 32, "preempted", "dynamic"),
    ("sdar", 4, "chunked", "dynamic"),
    ("sdar", 8, "whole", "static"),
    ("sdar", 16, "uneven", "dynamic"),
    ("sdar", 32, "preempted", "static"),
    ("fast_dllm_v2", 8, "whole", "dynamic"),
    ("fast_dllm_v2", 16, "uneven", "static"),
    ("fast_dllm_v2", 32, "chunked", "dynamic"),
    ("fast_dllm_v2", 32, "preempted", "static"),
    ("llada2", 8, "preempted", "dynamic"),
    ("llada2", 8, "whole", "static"),
    ("llada2", 16, "uneven", "dynamic"),
    ("llada2", 32, "chunked", "static"),
]
OTHERS = [
    (family, length, name, shapes)
    for family, lengths in FAMILIES.items()
    for length, name in ENGINES
    for shapes in SHAPES
    if length in lengths and (family, length, name, shapes) not in SELECTED
]


def cases_of(family: str, length: int) -> list[dict[str, Any]]:
    """The golden cases of one block length; AR decoding knows none, and is tested with 16."""
    cases = json.loads((GOLDEN / family / "golden.json").read_text())["cases"]
    return [case for case in cases if case.get("block_length", 16) == length]


def request_of(case: dict[str, Any], **more: Any) -> tuple[dict[str, Any], SamplingParams]:
    """The prompt and sampling parameters of one golden case, with `more` options."""
    name = case["algorithm"]
    if name == "ar":
        options: dict[str, Any] = {"nbdiff_mode": "ar"}
    else:
        options = {"nbdiff_algorithm": ALGORITHMS.get(name, name)}
        for field, key in FIELDS.items():
            if case.get(field) is not None:
                options[key] = case[field]
        if name == "origin":
            options["nbdiff_threshold"] = 1.0
    params = SamplingParams(
        temperature=0,
        max_tokens=len(case["expected"]),
        stop_token_ids=[case["eos_token_id"]],
        ignore_eos=True,
        detokenize=False,
        extra_args=options | more,
        thinking_token_budget=case.get("max_thinking_tokens"),
    )
    return {"prompt_token_ids": case["prompt"]}, params


@pytest.fixture(
    scope="module",
    params=[*SELECTED, *(pytest.param(other, marks=pytest.mark.long) for other in OTHERS)],
    ids=lambda param: "-".join(map(str, param)),
)
def engine(request: Any) -> Iterator[Any]:
    family, length, name, shapes = request.param
    llm = serve(
        GOLDEN / family / "tiny_a",
        hf_overrides={"block_length": length, "end_think_token_id": END_OF_THINKING},
        additional_config={"nbdiff": {"static_shapes": SHAPES[shapes]}},
        **ENGINES[length, name],
    )
    yield family, length, name, llm


def test_golden(engine: Any) -> None:
    """All cases of one block length in one batch, each prompt twice, then once more.

    Of the two, one commits blocks in forwards of their own, where a family does otherwise.
    """
    family, length, name, llm = engine
    own = BlockDiffusionConfig.from_vllm_config(llm.llm_engine.vllm_config).family
    fuses = own.seed == "never"
    cases = cases_of(family, length) * 2
    requests = [
        request_of(case, **({"nbdiff_fused_commit": int(2 * i < len(cases))} if fuses else {}))
        for i, case in enumerate(cases)
    ]
    prompts, params = zip(*requests, strict=True)
    for _ in range(2):
        outputs = tokens_of(llm.generate(list(prompts), list(params), use_tqdm=False))
        wrong = [
            {key: value for key, value in case.items() if not isinstance(value, list)}
            for case, tokens in zip(cases, outputs, strict=True)
            if tokens != case["expected"]
        ]
        assert not wrong
    assert (counter(llm, "vllm:num_preemptions") > 0) == (name == "preempted")


@pytest.mark.parametrize("fan_out", [0, 1, 4, 16])
def test_verified_drafts_are_ar_decoding(engine: Any, fan_out: int) -> None:
    """The golden cases of AR decoding, where a family has some, by drafts of any kind."""
    family, length, _, llm = engine
    cases = [case for case in cases_of(family, length) if case["algorithm"] == "ar"]
    if not cases:
        pytest.skip("its context is not causal, or the cases are of another block length")
    verify = {"nbdiff_mode": "verify", "nbdiff_fan_out": fan_out}
    prompts, params = zip(*(request_of(case, **verify) for case in cases), strict=True)
    outputs = tokens_of(llm.generate(list(prompts), list(params), use_tqdm=False))
    assert outputs == [case["expected"] for case in cases]
