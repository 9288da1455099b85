# SPDX-License-Identifier: Apache-2.0
"""Requests whose grammar and other constraints leave nothing end behind all that was legal.

Of a vocabulary whose token 0, which stands for none where nothing is left, is one that grammars
have, as it is in many.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.structured import DIFFUSION, LOSSLESS, MASK, NANO, params, settings

PROMPT = "<|user|>Ben has 5 shells.<|assistant|>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled one, in whose tokenizer "6" and the padding change places."""
    folder = shutil.copytree(NANO, tmp_path_factory.mktemp("zero") / "served")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    ids = tokenizer["model"]["vocab"]
    six = ids["6"]
    ids["6"], ids["<|pad|>"] = 0, six
    for token in tokenizer["added_tokens"]:
        token["id"] = six if token["id"] == 0 else token["id"]
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    file.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["dynamic", "static"])
def engine(request: Any, checkpoint: Path, make_llm: Callable[..., Any]) -> Any:
    own = {"additional_config": {"nbdiff": {"static_shapes": request.param}}}
    return make_llm(checkpoint, block_length=32, mask=MASK, **settings(**own))


def test_what_stands_for_no_token_is_never_text(engine: Any) -> None:
    """At the beginning, inside a block and behind one, and where the end is banned."""
    tokenizer = engine.get_tokenizer()
    (seven,), (zero,) = tokenizer.encode("7"), tokenizer.encode("6")
    assert zero == 0
    others = [tokenizer.encode(digit)[0] for digit in "012345789"]
    end = tokenizer.eos_token_id
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("6", {"allowed_token_ids": [seven]}, ""),
        ("[67]6", {"bad_words": ["6"]}, "7"),
        ("[0-9]{3}6[0-9]{4}", {"allowed_token_ids": others}, "[0-5789]{3}"),
        *((f"7{{{n}}}67", {"allowed_token_ids": [seven]}, "7" * n) for n in (31, 32, 33)),
        ("7{5}(6x)?", {"allowed_token_ids": [seven, end], "min_tokens": 20}, "7" * 5),
    ]
    for regex, constraints, legal in cases:
        texts = []
        modes = [*LOSSLESS, *DIFFUSION]
        requests: list[SamplingParams] = [
            params({"regex": regex}, extra_args=extra, logprobs=0, **constraints) for extra in modes
        ]
        alone = [engine.generate(PROMPT, own, use_tqdm=False)[0] for own in requests]
        for output in [*alone, *engine.generate([PROMPT] * len(modes), requests, use_tqdm=False)]:
            found = output.outputs[0]
            assert found.finish_reason == "abort"
            assert re.fullmatch(legal, found.text), (regex, found.text)
            assert len(found.logprobs) == len(found.token_ids) == len(found.text)
            texts.append(found.text)
        for own in (texts[: len(modes)], texts[len(modes) :]):
            assert set(own[: len(LOSSLESS)]) == {texts[0]}
