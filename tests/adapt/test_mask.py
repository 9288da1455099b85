# SPDX-License-Identifier: Apache-2.0
"""The training mask: by its definition, as dense mask and as mask_mod, through a real model."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_nbdiff.adapt.data import Collator, Example, cut_at_block
from vllm_nbdiff.adapt.mask import PAD, attention_mask, block_numbers, training_mask
from vllm_nbdiff.families.family import ContextMask


def dense(block: torch.Tensor, num_noised: int, context: ContextMask = "causal") -> torch.Tensor:
    rows, length = block.shape
    sees = training_mask(block, num_noised, context)
    return attention_mask(sees, rows, num_noised + length, block.device)


def may_see(
    query: tuple[bool, int],
    key: tuple[bool, int],
    prompt: int,
    block_length: int,
    context: ContextMask,
) -> bool:
    """The rule for two tokens, each a pair (noised, position in the text)."""
    (query_noised, q), (key_noised, k) = query, key
    origin = prompt if context == "causal" else 0
    begin = origin + (q - origin) // block_length * block_length
    own_block = range(begin, begin + block_length)
    if key_noised:
        return query_noised and k in own_block
    if query_noised:
        return k < begin
    return k <= q if context == "causal" else k < own_block.stop


@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 11), st.integers(1, 9)), min_size=1, max_size=3),
    block_length=st.sampled_from([1, 2, 4]),
    final=st.sampled_from([4, 8]),
    context=st.sampled_from(get_args(ContextMask)),
)
def test_equals_its_definition(
    lengths: list[tuple[int, int]], block_length: int, final: int, context: ContextMask
) -> None:
    """For texts of so many tokens of prompt and answer, cut and padded as for training."""
    examples: list[Example] = [
        {"input_ids": [*range(sum(text))], "prompt_length": text[0], "tail_length": 0}
        for text in lengths
    ]
    cut = [cut_at_block(example, final, context) for example in examples]
    batch = Collator(0, 0, final)([cut])
    num_answer, length = int(batch["answer_columns"]), batch["input_ids"].shape[1]
    num_prompt, padding = length - num_answer, batch["prompt_padding"]
    mask = dense(block_numbers(num_prompt, num_answer, block_length, padding), num_answer, context)
    assert mask.shape == (len(lengths), 1, num_answer + length, num_answer + length)
    columns = [(True, c) for c in range(num_prompt, length)] + [(False, c) for c in range(length)]
    for row, (prompt, _) in enumerate(lengths):
        padded = int(padding[row])
        tokens = [(noised, column - padded) for noised, column in columns]
        expected = [
            [
                q == k if q[1] < 0 or k[1] < 0 else may_see(q, k, prompt, block_length, context)
                for k in tokens
            ]
            for q in tokens
        ]
        assert mask[row, 0].tolist() == expected


def test_blocks_are_counted_from_where_the_prompt_ends() -> None:
    numbers = block_numbers(3, 5, 2, torch.tensor([0, 2]))
    assert numbers.tolist() == [[-2, -1, -1, 0, 0, 1, 1, 2], [PAD, PAD, -1, 0, 0, 1, 1, 2]]


def test_flex_attention_takes_the_same_function() -> None:
    """FlexAttention with it as mask_mod computes what SDPA does with the dense mask."""
    block = block_numbers(9, 64, 16, torch.tensor([0, 4]))
    size = 9 + 2 * 64
    sees = training_mask(block, 64)
    q, k, v = torch.randn(3, 2, 2, size, 16, generator=torch.Generator().manual_seed(0))
    blocks = attention_mask(sees, 2, size, torch.device("cpu"), "flex_attention")
    expected = scaled_dot_product_attention(q, k, v, attn_mask=dense(block, 64))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks), expected)


def test_other_attention_is_refused() -> None:
    sees = training_mask(block_numbers(1, 2, 2, torch.tensor([0])), 2)
    with pytest.raises(ValueError, match="flash_attention_2"):
        attention_mask(sees, 1, 5, torch.device("cpu"), "flash_attention_2")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("context", get_args(ContextMask))
def test_a_changed_token_reaches_exactly_the_rows_that_may_see_it(
    model: LlamaForCausalLM, context: ContextMask
) -> None:
    num_prompt, num_answer, block_length = 3, 8, 4
    size = num_prompt + 2 * num_answer
    mask = dense(
        block_numbers(num_prompt, num_answer, block_length, torch.tensor([0])), num_answer, context
    )
    clean = torch.arange(num_prompt + num_answer)
    position_ids = torch.cat([clean[num_prompt:], clean])[None]
    ids = torch.randint(1, 31, (1, size), generator=torch.Generator().manual_seed(1))

    def logits(token_ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            output = model(input_ids=token_ids, attention_mask=mask, position_ids=position_ids)
        return output.logits[0]

    before = logits(ids)
    # Two layers: a change travels one hop a layer, which the square of the mask describes.
    hops = mask[0, 0].float()
    reachable = (hops @ hops) > 0
    for key in range(size):
        changed = ids.clone()
        changed[0, key] = 31
        moved = (logits(changed) - before).abs().amax(dim=-1) > 1e-6
        assert moved.tolist() == reachable[:, key].tolist()


def test_clean_half_computes_what_the_plain_causal_model_does(model: LlamaForCausalLM) -> None:
    num_prompt, num_answer, padding = 4, 6, 2
    block = block_numbers(num_prompt, num_answer, 3, torch.tensor([padding]))
    ids = torch.randint(1, 31, (1, num_prompt + 2 * num_answer))
    position = (torch.arange(num_prompt + num_answer) - padding).clamp_min(0)
    with torch.inference_mode():
        ours = model(
            input_ids=ids,
            attention_mask=dense(block, num_answer),
            position_ids=torch.cat([position[num_prompt:], position])[None],
        ).logits[0, num_answer + padding :]
        plain = model(input_ids=ids[:, num_answer + padding :]).logits[0]
    torch.testing.assert_close(ours, plain)
