# SPDX-License-Identifier: Apache-2.0
"""Nothing is compiled once requests come: what they launch was compiled before."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from tests.conftest import options
from tests.interpreter import Specialisations, interpret_kernels, recorded_launches

interpret_kernels()

from vllm_nbdiff.kernels import logits  # noqa: E402

from vllm_nbdiff.decoding import draws  # noqa: E402
from vllm_nbdiff.engine import warm_up  # noqa: E402


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Specialisations]:
    """By every kernel from here on."""
    for module in (draws, warm_up):
        monkeypatch.setattr(module, "has_kernels", lambda logits: True)
    # Rows of logits are cut into parts as on a GPU.
    monkeypatch.setattr(logits, "multiprocessor_count", lambda device: 16)
    with recorded_launches() as found:
        yield found


REQUESTS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (3, {}, {}),
    (19, {}, {"mode": "verify"}),
    (2, {}, {"mode": "verify", "draft_length": 3}),
    (5, {}, {"mode": "ar"}),
    (1, {}, {"mode": "auto"}),
    (4, {}, {"algorithm": "freedave", "draft_steps": 2}),
    (7, {}, {"algorithm": "entropy", "small_blocks": 2}),
    (6, {}, {"block_length": 2}),
    (3, {"temperature": 0.9, "seed": 3}, {}),
    (9, {"temperature": 0.9, "seed": 3, "top_k": 9, "top_p": 0.8}, {"mode": "verify"}),
    (2, {"temperature": 0.7, "seed": 5, "min_p": 0.1, "repetition_penalty": 1.2}, {}),
    (8, {"logit_bias": {7: 2.0}, "logprobs": 2}, {"mode": "ar"}),
]


def test_requests_launch_what_is_compiled(
    own_attention: None,
    launched: Specialisations,
    make_checkpoint: Callable[..., Any],
    make_llm: Callable[..., Any],
) -> None:
    """One, some and all together: other numbers of rows, and other tiles. The logits of such a
    vocabulary are padded."""
    folder, _ = make_checkpoint("llama", vocab_size=163, seed=4, dtype="bfloat16")
    llm = make_llm(
        folder,
        block_length=4,
        mask=159,
        max_model_len=64,
        dtype="bfloat16",
        additional_config={"nbdiff": {"static_shapes": True}},
        enforce_eager=False,  # which asks vLLM for no warm-up
        compilation_config={"mode": 0, "cudagraph_mode": "NONE"},
    )
    compiled = set(launched)
    prompts = [{"prompt_token_ids": list(range(2, 2 + n))} for n, _, _ in REQUESTS]
    params = [
        SamplingParams(
            max_tokens=5, ignore_eos=True, detokenize=False, extra_args=options(**asked),
            **{"temperature": 0, **settings},
        )
        for _, settings, asked in REQUESTS
    ]  # fmt: skip
    whole = slice(0, len(prompts))
    for own in (slice(1), *(slice(i, i + 3) for i in range(0, len(prompts), 3)), whole):
        llm.generate(prompts[own], params[own], use_tqdm=False)
        assert launched - compiled == set(), own
    assert {name for name, *_ in launched} == {
        "_segment_attention_kernel",
        "_cut_keys_kernel",
        "_combine_parts_kernel",
        "_write_kv_kernel",
        "_partial_statistics_kernel",
        "_final_statistics_kernel",
        "_filter_bounds_kernel",
        "partial_sums_kernel",
        "_final_sample_kernel",
    }
