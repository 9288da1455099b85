# SPDX-License-Identifier: Apache-2.0
"""Step maps of every family: replayed on whole forwards without a KV cache they give the text."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from tests.conftest import GOLDEN, options
from tests.families.engines import serve
from tests.families.oracles import ORACLES
from tests.families.test_golden import END_OF_THINKING, cases_of
from vllm_nbdiff.config import BlockDiffusionConfig

LENGTH = 8
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "nemotron_labs_diffusion": [
        options(threshold=0.3, small_blocks=2),
        options(threshold=0.9, small_blocks=1),
        options(algorithm="entropy", small_blocks=1),
    ],
    "sdar": [
        options(threshold=0.3),
        {**options(algorithm="low_confidence_static"), "diffusion_max_steps": 3},
        {**options(algorithm="sequential"), "diffusion_max_steps": 5},
        options(algorithm="entropy_bounded", threshold=2.0, fused_commit=0),
    ],
    "fast_dllm_v2": [options(threshold=0.3, small_blocks=2), options(threshold=1, small_blocks=1)],
    "llada2": [options(threshold=0.2), options(threshold=0.2, fused_commit=0), options()],
}


def replay(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    config: BlockDiffusionConfig,
    prompt: list[int],
    steps: list[int],
) -> list[int]:
    """The text in which each position is filled with its best token, at its step."""
    family, mask = config.family, config.mask_token_id
    origin = 0 if family.block_causal else len(prompt)
    text = list(prompt)
    while len(text) < len(prompt) + len(steps):
        first = len(text)
        start = origin + (first - origin) // LENGTH * LENGTH
        own = dict(enumerate(steps[first - len(prompt) :][: start + LENGTH - first], first))
        text += [mask] * len(own)
        place = (torch.arange(len(text)) - origin) // LENGTH
        causal = torch.ones(len(text), len(text), dtype=torch.bool).tril()
        visible = causal if not family.block_causal else place[:, None] >= place
        for step in range(-1, max(own.values()) + 1):
            seen, shift = visible, family.shifts
            if step == -1:
                seen, shift = visible[:first, :first], True  # of the finished text
            elif not family.block_causal:
                seen = visible | (place[:, None] == place) & (place >= place[-1])
            rows = logits_of(torch.tensor(text[: len(seen)]), seen)
            rows[:, mask] = -torch.inf
            for position in (position for position in own if own[position] == step):
                assert step >= 0 or position == first
                text[position] = int(rows[position - shift].argmax())
    return text[len(prompt) :]


@pytest.mark.parametrize("name", REQUESTS)
def test_replayed_it_gives_the_text(name: str) -> None:
    """In one batch, beside requests that do not ask; on a GPU's path where a family guesses no
    seeds."""
    static = name in ("sdar", "nemotron_labs_diffusion")
    llm = serve(
        GOLDEN / name / "tiny_a",
        hf_overrides={"block_length": LENGTH, "end_think_token_id": END_OF_THINKING},
        additional_config={"nbdiff": {"static_shapes": static}},
        max_num_batched_tokens=64,
    )
    config = BlockDiffusionConfig.from_vllm_config(llm.llm_engine.vllm_config)
    oracle = ORACLES[name](GOLDEN / name / "tiny_a")
    prompts = [case["prompt"] for case in cases_of(name, LENGTH)][:3]
    cases = [(prompt, extra) for prompt in prompts for extra in REQUESTS[name]]
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt, _ in cases]
    params = [
        SamplingParams(
            # Whole blocks: of a part the rest is not known.
            temperature=0, max_tokens=24 - len(prompt) % LENGTH * config.family.block_causal,
            ignore_eos=True, detokenize=False, extra_args=extra | options(step_map=asks),
        )
        for asks in (1, 0) for prompt, extra in cases
    ]  # fmt: skip
    outputs = [output.outputs[0] for output in llm.generate(2 * requests, params, use_tqdm=False)]
    for (prompt, _), output in zip(cases, outputs, strict=False):
        text = replay(
            lambda ids, visible: oracle(ids, visible, torch.float64),
            config,
            prompt,
            output.step_map,
        )
        assert text == output.token_ids
    assert all(output.step_map is None for output in outputs[len(cases) :])
    assert len({tuple(output.step_map) for output in outputs[: len(cases)]}) > len(cases) // 2
    if config.family.thinking_budget:
        params[0].thinking_token_budget = 5
        (output,) = llm.generate(requests[0], params[0], use_tqdm=False)
        steps = output.outputs[0].step_map
        assert [place for place, step in enumerate(steps) if step == -1] == [0, 5, 8, 16]
    if name == "llada2":
        edited = SamplingParams(
            temperature=0, max_tokens=16, detokenize=False,
            extra_args=options(algorithm="edit", threshold=0.2, editing_threshold=0, step_map=1),
        )  # fmt: skip
        (output,) = llm.generate(requests[0], edited, use_tqdm=False)
        assert len(output.outputs[0].step_map) == len(output.outputs[0].token_ids)
