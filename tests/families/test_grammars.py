# SPDX-License-Identifier: Apache-2.0
"""Structured output of every family: legal, whatever its blocks look like and where they begin."""

import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests import reasoning_parser
from tests.engine.grammar_cases import is_valid, random_constraint
from tests.families.checkpoints import GOLDEN_FAMILIES, RANDOM, checkpoint, config_of
from tests.families.engines import serve

NANO = Path(__file__).parents[2] / "examples" / "nbdiff-nano"
CONSTRAINTS = [random_constraint(Random(seed)) for seed in range(16)]


def with_tokenizer(family: str, folder: Path) -> Path:
    """Its checkpoint, with a token for a byte: the first ones of the bundled tokenizer."""
    made = folder / "made"
    made.mkdir()
    served = shutil.copytree(checkpoint(family, made), folder / "served")
    config = config_of(family)
    ids = Tokenizer.from_file(str(NANO / "tokenizer.json")).get_vocab()
    tokens = {token: i for token, i in ids.items() if i < config["vocab_size"]}
    eos = next(token for token, i in ids.items() if i == config["eos_token_id"])
    tokenizer = Tokenizer(BPE(tokens, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(served)
    return served


@pytest.mark.parametrize("family", [*GOLDEN_FAMILIES, *RANDOM])
def test_every_text_is_legal(family: str, tmp_path: Path) -> None:
    structured = {"backend": "xgrammar", "disable_any_whitespace": True}
    llm = serve(
        with_tokenizer(family, tmp_path),
        skip_tokenizer_init=False,
        structured_outputs_config=structured,
    )
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
        prompts: list[Any] = [
            {"prompt_token_ids": [5 + (7 * j + i) % 80 for j in range(3 + i)]} for i in range(16)
        ]
        params = [
            SamplingParams(
                max_tokens=90, structured_outputs=StructuredOutputsParams(**c), **sampling
            )
            for c in CONSTRAINTS
        ]
        ends = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        assert {end.finish_reason for end in ends} <= {"stop", "length"}
        texts = [
            (constraint, end.text)
            for constraint, end in zip(CONSTRAINTS, ends, strict=True)
            if end.finish_reason == "stop"
        ]
        assert len(texts) > 8
        assert [pair for pair in texts if not is_valid(*pair)] == []
    _all_that_is_legal_is_given(llm)


def _all_that_is_legal_is_given(llm: Any) -> None:
    """Where `min_tokens` bans the end of a text that is complete: wherever in a block that is, with
    room for one more token, and with room for many."""
    cases = [(length, most) for length in range(1, 10) for most in (length + 1, 60)]
    params = [
        SamplingParams(
            temperature=0,
            min_tokens=most,
            max_tokens=most,
            structured_outputs=StructuredOutputsParams(regex=f"[0-9]{{{length}}}"),
        )
        for length, most in cases
    ]
    prompts: list[Any] = [{"prompt_token_ids": [19, 26, 33, 40, 47]}] * len(cases)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for (length, _), output in zip(cases, outputs, strict=True):
        (end,) = output.outputs
        assert end.finish_reason == "abort" and re.fullmatch(f"[0-9]{{{length}}}", end.text)


def test_beside_drafts(tmp_path: Path) -> None:
    """With static shapes, a request that drafts nothing: as alone."""
    llm = serve(
        with_tokenizer("nemotron_labs_diffusion", tmp_path),
        skip_tokenizer_init=False,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        additional_config={"nbdiff": {"static_shapes": True}},
    )
    constraint = {"regex": "([0-9][a-z]){12}"}
    structured = StructuredOutputsParams(**constraint)
    modes: list[tuple[str, Any]] = [("ar", structured), ("verify", None)]
    params = [
        SamplingParams(
            temperature=0, max_tokens=40, structured_outputs=own, extra_args={"nbdiff_mode": mode}
        )
        for mode, own in modes
    ]
    prompts: list[Any] = [{"prompt_token_ids": [19, 26, 33, 40, 47]}] * 2
    together = llm.generate(prompts, params, use_tqdm=False)
    (alone,) = llm.generate(prompts[:1], params[0], use_tqdm=False)
    (end,) = alone.outputs
    assert end.finish_reason == "stop" and is_valid(constraint, end.text)
    assert together[0].outputs[0].token_ids == end.token_ids


def test_thoughts_have_a_budget(tmp_path: Path) -> None:
    """Where it is spent thinking ends, once, and the answer is legal; a prompt that has ended
    thinking leaves nothing to bound."""
    folder = with_tokenizer("nemotron_labs_diffusion", tmp_path)
    (end,) = PreTrainedTokenizerFast.from_pretrained(folder).encode(reasoning_parser.END)
    llm = serve(
        folder,
        skip_tokenizer_init=False,
        hf_overrides={"end_think_token_id": end},
        structured_outputs_config={
            "backend": "xgrammar",
            "disable_any_whitespace": True,
            "reasoning_parser": "colon",
            "reasoning_parser_plugin": reasoning_parser.__file__,
        },
    )
    wanted: dict[str, Any] = {"choice": ["Tuesday", "In the end"]}

    def text(prompt: list[int], budget: int | None, bias: float, mode: dict[str, Any]) -> str:
        own = SamplingParams(
            temperature=0, max_tokens=60, thinking_token_budget=budget, logit_bias={end: bias},
            structured_outputs=StructuredOutputsParams(**wanted), extra_args=dict(mode),
        )  # fmt: skip
        (output,) = llm.generate([{"prompt_token_ids": prompt}], own, use_tqdm=False)
        assert output.outputs[0].finish_reason == "stop"
        return output.outputs[0].text

    modes: list[dict[str, Any]] = [{}, {"nbdiff_mode": "ar"}, {"nbdiff_mode": "verify"}]
    prompt = [48, 59, 32, 39, 17]
    for budget in (0, 1, 2, 7, 16, 33):
        # Never ended by the model, and by the first token.
        for bias, most in ((-100.0, budget), (100.0, 0)):
            texts = [text(prompt, budget, bias, mode) for mode in modes]
            assert texts[1] == texts[2]
            for found in texts:
                thought, _, answer = found.partition(reasoning_parser.END)
                assert is_valid(wanted, answer) and len(thought) <= most
            if bias < 0:
                assert len(texts[1].partition(reasoning_parser.END)[0]) == budget
        for mode in modes:
            free = text([*prompt, end], None, 0.0, mode)
            assert is_valid(wanted, free) and text([*prompt, end], budget, 0.0, mode) == free
