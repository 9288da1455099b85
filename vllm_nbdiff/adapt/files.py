# SPDX-License-Identifier: Apache-2.0
"""JSON lines of conversations or texts, as batches that a Trainer reads."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from vllm_nbdiff.adapt.data import (
    Example,
    cut_at_block,
    encode,
    pack,
    row_length,
    token_batches,
)
from vllm_nbdiff.families.family import ContextMask


def read(path: Path) -> datasets.Dataset:
    """Lines with ``messages`` (role and content each) or with ``text``.

    Raises:
        ValueError: If the file has no lines, or neither of these keys.
    """
    if not path.read_text(encoding="utf-8").strip():
        raise ValueError(f"{path} is empty")
    lines = datasets.load_dataset("json", data_files=str(path), split="train")
    if not {"messages", "text"} & set(lines.column_names):
        raise ValueError(
            f"{path}: a line needs 'messages' or 'text', found {', '.join(lines.column_names)}"
        )
    return lines


def tokenize(
    lines: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    max_length: int,
    drop_long: bool = False,
    context: ContextMask = "causal",
) -> datasets.Dataset:
    """Examples, cut for their context; texts are packed to ``max_length``.

    Raises:
        ValueError: If a conversation, its answer filled up to whole blocks, is longer than
            ``max_length`` (``drop_long`` leaves such ones out), ``max_length`` holds no block of a
            text, or no row is left.
    """

    def cut(example: Example) -> Example:
        return cut_at_block(example, block_length, context)

    if "messages" in lines.column_names:
        rows = lines.map(
            lambda line: cut(encode(tokenizer, line["messages"])), remove_columns=lines.column_names
        )
        rows = _checked(rows, block_length, max_length, drop_long)
    else:
        prompt = cut({"input_ids": [], "prompt_length": 1, "tail_length": 0})["prompt_length"]
        whole = (max_length - prompt) // block_length * block_length
        if not whole:
            raise ValueError(f"--max-length {max_length} holds no block of {block_length} tokens")
        packed = pack(tokenizer, lines["text"], prompt + whole)
        rows = datasets.Dataset.from_list([cut(example) for example in packed])
    if not len(rows):
        raise ValueError("no training examples are left")
    return rows


def _checked(
    rows: datasets.Dataset, block_length: int, max_length: int, drop_long: bool
) -> datasets.Dataset:
    def needed(row: Example) -> int:
        prompt, answer = _lengths(row)
        return row_length(prompt, answer, block_length, copies=1)

    fits = [index for index, row in enumerate(rows) if needed(row) <= max_length]
    if len(fits) < len(rows) and not drop_long:
        first = next(index for index, row in enumerate(rows) if needed(row) > max_length)
        raise ValueError(
            f"example {first + 1} needs {needed(rows[first])} tokens, more than the {max_length} "
            "of --max-length (by default the model's context); shorten it, or --drop-long"
        )
    return rows.select(fits)


def _lengths(row: Example) -> tuple[int, int]:
    return row["prompt_length"], len(row["input_ids"]) - row["prompt_length"]


class Batches(torch.utils.data.Dataset[list[Example]]):
    """Rows grouped to batches of about ``tokens`` tokens; an item is one batch."""

    def __init__(self, rows: Any, block_length: int, tokens: int, seed: int) -> None:
        self.rows = rows
        lengths = [row_length(*_lengths(row), block_length) for row in rows]
        numbers: Iterable[int] = range(len(lengths))
        self.plan = list(token_batches(numbers, lengths.__getitem__, tokens, seed))

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[Example]:
        return [self.rows[number] for number in self.plan[index]]
