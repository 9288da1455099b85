# SPDX-License-Identifier: Apache-2.0
"""From conversations to batches whose answers all start at the same column."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from random import Random
from typing import TypedDict, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from vllm_nbdiff.families.family import ContextMask

T = TypeVar("T")
LENGTH_STEP = 32


class Example(TypedDict):
    """A tokenized prompt of ``prompt_length`` tokens and its answer, which ends with eos.

    The first ``tail_length`` tokens of the answer are prompt too, see :func:`cut_at_block`.
    """

    input_ids: list[int]
    prompt_length: int
    tail_length: int


class Batch(TypedDict):
    """Left-padded prompts and right-padded answers.

    ``input_ids`` is ``[rows, prompt columns + answer columns]`` int64; ``prompt_padding``,
    ``tail_length`` and ``answer_length``, which counts the tail, are ``[rows]`` int64,
    ``answer_columns`` a 0-d int64.
    """

    input_ids: torch.Tensor
    prompt_padding: torch.Tensor
    tail_length: torch.Tensor
    answer_length: torch.Tensor
    answer_columns: torch.Tensor


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> Example:
    """Tokenize a conversation; its last message is the answer, all before it the prompt.

    Raises:
        ValueError: If the last message is not the assistant's or the tokenizer has no eos.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last message of an example must have the role 'assistant'")
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no eos_token, which must end every answer")
    rendered = tokenizer.apply_chat_template(
        list(messages[:-1]), add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    text = messages[-1]["content"] + tokenizer.eos_token
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + answer, "prompt_length": len(prompt), "tail_length": 0}


def cut_at_block(example: Example, block_length: int, context: ContextMask) -> Example:
    """``example`` with its prompt ending where the first denoised block begins.

    With a causal context that is the prompt's end. With a block-causal one it is the last multiple
    of ``block_length``: the rest of the prompt, its tail, counts as answer, of which it is the
    beginning that is never noised and no target.
    """
    if context == "causal":
        return example
    prompt, tail = example["prompt_length"], example["prompt_length"] % block_length
    return {**example, "prompt_length": prompt - tail, "tail_length": tail}


def pack(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int
) -> Iterator[Example]:
    """Cut texts, each ended by eos and put end to end, into rows of ``length`` tokens.

    The first token of a row is its prompt, the rest its answer; only the last row may be shorter.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which must end every text")
    kept: list[int] = []
    for text in texts:
        kept += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        while len(kept) >= length:
            yield {"input_ids": kept[:length], "prompt_length": 1, "tail_length": 0}
            kept = kept[length:]
    if len(kept) > 1:
        yield {"input_ids": kept, "prompt_length": 1, "tail_length": 0}


def row_length(prompt: int, answer: int, block_length: int, copies: int = 2) -> int:
    """Columns of a row ``[noised ; clean]``, whose answer is padded to whole blocks."""
    return prompt + copies * -(-answer // block_length) * block_length


def token_batches(
    items: Iterable[T], length: Callable[[T], int], tokens: int, seed: int, pool: int = 256
) -> Iterator[list[T]]:
    """Group items of like length, so that little is padding and a long answer costs rows.

    Args:
        items: Taken ``pool`` at a time; the batches of a pool come in random order.
        length: Columns that an item takes in a batch.
        tokens: Most tokens of a batch, padding included; a longer item is a batch of its own.
        seed: Of that order.
    """
    stream, rng = iter(items), Random(f"batches {seed}")
    # Up to LENGTH_STEP columns of padding keep different kinds of text in one batch.
    while taken := sorted(islice(stream, pool), key=lambda item: length(item) // LENGTH_STEP):
        batches: list[list[T]] = [[]]
        widest = 0
        for item in taken:
            widest = max(widest, length(item))
            if batches[-1] and (len(batches[-1]) + 1) * widest > tokens:
                batches.append([])
                widest = length(item)
            batches[-1].append(item)
        rng.shuffle(batches)
        yield from batches


@dataclass(frozen=True)
class Collator:
    """Pads batches of :func:`token_batches` to one batch of tensors.

    Args:
        pad_token_id: Fills up prompts on the left.
        eos_token_id: Fills up answers on the right, as a served model does after its eos.
        answer_multiple: Answer columns are a multiple of this: the final block length, or 1.
    """

    pad_token_id: int
    eos_token_id: int
    answer_multiple: int

    def __call__(self, batches: Sequence[Sequence[Example]]) -> Batch:
        """Join ``batches`` (the Trainer hands over one) and pad them."""
        examples = list(chain.from_iterable(batches))
        prompts = [example["prompt_length"] for example in examples]
        answers = [len(example["input_ids"]) - example["prompt_length"] for example in examples]
        prompt_columns = max(prompts)
        answer_columns = -(-max(answers) // self.answer_multiple) * self.answer_multiple
        rows = [
            [self.pad_token_id] * (prompt_columns - prompt)
            + example["input_ids"]
            + [self.eos_token_id] * (answer_columns - answer)
            for example, prompt, answer in zip(examples, prompts, answers, strict=True)
        ]
        return {
            "input_ids": torch.tensor(rows),
            "prompt_padding": prompt_columns - torch.tensor(prompts),
            "tail_length": torch.tensor([example["tail_length"] for example in examples]),
            "answer_length": torch.tensor(answers),
            "answer_columns": torch.tensor(answer_columns),
        }
