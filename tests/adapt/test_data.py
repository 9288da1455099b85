# SPDX-License-Identifier: Apache-2.0
"""From conversations and texts to batches of token ids."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_nbdiff.adapt import files
from vllm_nbdiff.adapt.data import Example, cut_at_block, encode, pack, token_batches

WORDS = ["<pad>", "<eos>", "<user>", "<bot>", "one", "plus", "two", "three", "four"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}"
    "{{ m['content'] }}{{ ' ' if m['role'] == 'user' else ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def test_prompt_is_the_rendering_and_the_answer_ends_with_eos(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = encode(
        tokenizer,
        [
            {"role": "user", "content": "one plus one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "one plus two"},
            {"role": "assistant", "content": "three"},
        ],
    )
    text = [WORDS[token] for token in example["input_ids"]]
    prompt = "<user> one plus one <bot> two <eos> <user> one plus two <bot>"
    assert " ".join(text[: example["prompt_length"]]) == prompt
    assert text[example["prompt_length"] :] == ["three", "<eos>"]


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "one"}]])
def test_conversation_must_end_with_an_answer(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(ValueError, match="assistant"):
        encode(tokenizer, messages)


def test_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        encode(tokenizer, [{"role": "assistant", "content": "one"}])


@given(
    lengths=st.lists(st.integers(1, 200), max_size=80),
    tokens=st.integers(50, 400),
    seed=st.integers(0, 99),
)
def test_batches_hold_every_item_once_within_the_budget(
    lengths: list[int], tokens: int, seed: int
) -> None:
    batches = list(token_batches(range(len(lengths)), lengths.__getitem__, tokens, seed, pool=32))
    assert sorted(item for batch in batches for item in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[item] for item in batch) <= tokens
    again = token_batches(range(len(lengths)), lengths.__getitem__, tokens, seed, pool=32)
    assert batches == list(again)


def test_texts_are_packed_end_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = list(pack(tokenizer, ["one plus two", "three", "four one one"], 4))
    words = [" ".join(WORDS[token] for token in row["input_ids"]) for row in rows]
    assert words == ["one plus two <eos>", "three <eos> four one", "one <eos>"]
    assert [row["prompt_length"] for row in rows] == [1, 1, 1]


def write(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def talk(answer: str) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": "one plus one"},
            {"role": "assistant", "content": answer},
        ]
    }


def test_file_of_conversations_becomes_batches(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = files.read(write(tmp_path / "data.jsonl", [talk("two"), talk("three four")]))
    rows = files.tokenize(lines, tokenizer, block_length=4, max_length=20)
    batches = files.Batches(rows, block_length=4, tokens=100, seed=0)
    assert len(batches) == 1
    words = sorted([WORDS[token] for token in row["input_ids"][5:]] for row in batches[0])
    assert words == [["three", "four", "<eos>"], ["two", "<eos>"]]


@pytest.mark.parametrize(("prompt", "whole"), [(3, 0), (4, 4), (5, 4), (8, 8), (11, 8)])
def test_prompts_are_cut_where_the_first_canvas_begins(prompt: int, whole: int) -> None:
    example: Example = {"input_ids": [*range(20)], "prompt_length": prompt, "tail_length": 0}
    assert cut_at_block(example, 4, "causal") == example
    cut = cut_at_block(example, 4, "block-causal")
    expected = {"prompt_length": whole, "tail_length": prompt - whole}
    assert cut == {"input_ids": example["input_ids"], **expected}


def test_block_causal_rows_are_whole_blocks(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Also where that makes a row longer: 5 tokens of prompt and 8 of answer fill 4 blocks of 4."""
    path = write(tmp_path / "data.jsonl", [talk("two " * 7)])
    for context, needed in (("causal", 13), ("block-causal", 16)):
        options = {"block_length": 4, "context": context}
        assert len(files.tokenize(files.read(path), tokenizer, max_length=needed, **options)) == 1
        with pytest.raises(ValueError, match=f"needs {needed} tokens"):
            files.tokenize(files.read(path), tokenizer, max_length=needed - 1, **options)
    lines = files.read(write(tmp_path / "texts.jsonl", [{"text": "one two three " * 4}]))
    for context, prompt, length in (("causal", 1, 9), ("block-causal", 0, 8)):
        rows = files.tokenize(lines, tokenizer, 4, 11, context=context)
        assert [len(row["input_ids"]) for row in rows] == [length, 13 - length]
        assert {(r["prompt_length"], r["tail_length"]) for r in rows} == {(prompt, 1 - prompt)}


def test_unusable_files_say_why(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty"):
        files.read(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ValueError, match="'messages' or 'text', found question"):
        files.read(write(tmp_path / "other.jsonl", [{"question": "one"}]))
    lines = files.read(write(tmp_path / "long.jsonl", [talk("two"), talk("two " * 30)]))
    with pytest.raises(ValueError, match="example 2 needs 37 tokens, more than the 20"):
        files.tokenize(lines, tokenizer, block_length=4, max_length=20)
    kept = files.tokenize(lines, tokenizer, block_length=4, max_length=20, drop_long=True)
    assert len(kept) == 1
    with pytest.raises(ValueError, match="no training examples"):
        files.tokenize(lines, tokenizer, block_length=4, max_length=2, drop_long=True)
    texts = files.read(write(tmp_path / "texts.jsonl", [{"text": "one two"}]))
    with pytest.raises(ValueError, match="--max-length 3 holds no block of 4"):
        files.tokenize(texts, tokenizer, block_length=4, max_length=3, context="block-causal")
    blank = files.read(write(tmp_path / "blank.jsonl", [{"text": ""}]))
    with pytest.raises(ValueError, match="no training examples"):
        files.tokenize(blank, tokenizer, block_length=4, max_length=20)
