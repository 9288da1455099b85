# SPDX-License-Identifier: Apache-2.0
"""Full graphs serve every decode: with the text, the drafts and the counts of forwards without."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode

from tests.conftest import options, tokens_of
from tests.engine.conftest import plugins_attention
from tests.engine.graphs import Rehearsal, rehearse
from tests.engine.test_static_shapes import device_steps, every_request, generate
from vllm_nbdiff.decoding import fan_out

MOST = 160


@pytest.fixture(scope="module")
def engines(golden_checkpoint: Any, make_llm: Callable[..., Any]) -> Iterator[list[Any]]:
    """With static shapes, with and without graphs, and with shapes that depend on values."""
    sizes: dict[str, Any] = {"block_length": 8, "max_num_batched_tokens": MOST, "block_size": 16}
    sizes |= {"max_model_len": 256, "num_gpu_blocks_override": 400}
    kernel = {"attention_kernel": "torch"}
    with plugins_attention():
        # The last engine has the metrics.
        yield [
            make_llm(golden_checkpoint, additional_config={"nbdiff": kernel | shapes}, **sizes)
            for shapes in ({}, {"static_shapes": True}, {"static_shapes": True})
        ][::-1]


@pytest.fixture(scope="module")
def graphs(engines: list[Any]) -> Rehearsal:
    """Of the first engine."""
    return rehearse(engines[0], MOST)


def test_every_option_gives_the_same_text(engines: list[Any], graphs: Rehearsal) -> None:
    """All in one batch, and alone; steps without prompts run in full graphs, whatever they do."""
    requests = every_request()
    expected = generate(engines[2], requests)
    given = generate(engines[0], requests)
    assert [i for i, text in enumerate(given) if text != expected[i]] == []
    alone = [generate(engines[0], [request])[0] for request in requests]
    assert [i for i, text in enumerate(alone) if text != expected[i]] == []
    modes = [desc.cg_mode for decodes, desc in graphs.steps if decodes]
    assert len(modes) > 200 and set(modes) == {CUDAGraphMode.FULL}
    assert {desc.cg_mode for decodes, desc in graphs.steps if not decodes} == {CUDAGraphMode.NONE}
    counted = device_steps(engines[0])
    assert counted["full"] == len(modes) and counted.keys() == {"full", "none"}
    # Of several sizes, for few requests and for many.
    assert len({(desc.num_tokens, desc.num_reqs) for _, desc in graphs.steps}) > 12


@pytest.mark.parametrize("extra", [{"draft_length": 6}, {}], ids=str)
def test_drafts_are_those_made_without_graphs(
    extra: dict[str, Any],
    engines: list[Any],
    graphs: Rehearsal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KV before a canvas on its first page is copied in a graph too: without, drafts get worse."""
    params = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, detokenize=False,
        extra_args=options(mode="verify", fan_out=4, **extra),
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [(7 * i + 3 * j) % 500 for j in range(20)]} for i in range(3)]
    made: list[list[list[int]]] = []
    drafts = fan_out.drafts

    def noted(*args: Any) -> fan_out.Drafts:
        found = drafts(*args)
        made.append(found.token[found.hit].tolist())
        return found

    monkeypatch.setattr(fan_out, "drafts", noted)
    found = []
    for llm in engines[:2]:
        texts = tokens_of(llm.generate(prompts, params, use_tqdm=False))
        found.append((texts, list(made)))
        made.clear()
    assert found[0] == found[1]
    assert sum(map(len, found[0][1])) > 40
