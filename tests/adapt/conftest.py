# SPDX-License-Identifier: Apache-2.0
"""A very small model and a batch of two answers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_nbdiff.adapt.data import Batch, Collator, Example

PAD, EOS, MASK = 0, 1, 2
VOCAB = 40


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def two_examples() -> list[Example]:
    return [
        {
            "input_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13, EOS],
            "prompt_length": 4,
            "tail_length": 0,
        },
        {"input_ids": [20, 21, 22, 23, EOS], "prompt_length": 1, "tail_length": 0},
    ]


@pytest.fixture
def batch(two_examples: list[Example]) -> Batch:
    return Collator(PAD, EOS, answer_multiple=4)([two_examples])
