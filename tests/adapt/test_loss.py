# SPDX-License-Identifier: Apache-2.0
"""The losses against plain transformers and against a loop over blocks."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from vllm_nbdiff.adapt.data import Batch, Collator, Example, cut_at_block
from vllm_nbdiff.adapt.loss import (
    LossOptions,
    _forward,
    acceptance_weights,
    adaptation_loss,
    ar_loss,
)
from vllm_nbdiff.adapt.noise import noise_blocks
from vllm_nbdiff.families.family import ContextMask
from vllm_nbdiff.reference import Context

PAD, EOS, MASK = 0, 1, 2  # as in conftest.py


def test_collator_aligns_the_answers(batch: Batch) -> None:
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 10, 11, 12, 13, EOS, EOS, EOS],
        [PAD, PAD, PAD, 20, 21, 22, 23, EOS, EOS, EOS, EOS, EOS],
    ]
    assert batch["prompt_padding"].tolist() == [0, 3]
    assert batch["answer_length"].tolist() == [6, 4]
    assert batch["answer_columns"].item() == 8


def transformers_loss(model: LlamaForCausalLM, examples: list[Example]) -> torch.Tensor:
    """Next-token loss of each conversation by itself, the prompt left out."""
    total, targets = torch.zeros(()), 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        labels = ids.clone()
        labels[:, : example["prompt_length"]] = -100
        number = len(example["input_ids"]) - example["prompt_length"]
        total = total + model(input_ids=ids, labels=labels).loss * number
        targets += number
    return total / targets


def test_ar_loss_is_transformers_own(
    tiny_model: LlamaForCausalLM, two_examples: list[Example], batch: Batch
) -> None:
    expected = transformers_loss(tiny_model, two_examples)
    torch.testing.assert_close(ar_loss(tiny_model, batch), expected)


def test_blocks_of_one_token_are_next_token_training(
    tiny_model: LlamaForCausalLM, two_examples: list[Example], batch: Batch
) -> None:
    losses = adaptation_loss(tiny_model, batch, 1, MASK, LossOptions(ar_weight=1.0))
    expected = transformers_loss(tiny_model, two_examples)
    assert losses.masked == 0
    torch.testing.assert_close(losses.total, expected)
    losses.total.backward()
    gradient = tiny_model.model.embed_tokens.weight.grad
    assert gradient is not None
    ours = gradient.clone()
    tiny_model.zero_grad()
    expected.backward()
    torch.testing.assert_close(ours, tiny_model.model.embed_tokens.weight.grad)


def texts(context: ContextMask) -> list[Example]:
    """Prompts that end inside a block of 4, in the first one or a later one, and on a block."""
    rows: list[Example] = [
        {
            "input_ids": [*range(3 + number, 3 + number + prompt + answer), EOS],
            "prompt_length": prompt,
            "tail_length": 0,
        }
        for number, (prompt, answer) in enumerate([(3, 6), (4, 2), (7, 1), (8, 7), (9, 4)])
    ]
    return [cut_at_block(row, 4, context) for row in rows]


def read_prompt(context: Context, prompt: list[int], block_length: int) -> torch.Tensor | None:
    """Logits after a prompt, finished as it is served; None after no prompt."""
    logits = None
    piece = block_length if context.block_causal else len(prompt)
    for start in range(0, len(prompt), max(1, piece)):
        logits = context.append(prompt[start : start + piece])
    return logits


@pytest.mark.parametrize("block_length", [2, 4])
@pytest.mark.parametrize("context_mask", get_args(ContextMask))
def test_logits_are_what_decoding_sees(
    tiny_model: LlamaForCausalLM, context_mask: ContextMask, block_length: int
) -> None:
    """Each block through the decoder's own forwards: earlier clean text in the KV cache."""
    batch = Collator(PAD, EOS, answer_multiple=4)([texts(context_mask)])
    columns = int(batch["answer_columns"])
    answer, known = batch["input_ids"][:, -columns:], batch["tail_length"]
    noised = noise_blocks(answer, block_length, MASK, known=known).ids
    with torch.inference_mode():
        by_noised, by_clean = _forward(tiny_model, batch, noised, block_length, context_mask)
    for row in range(len(answer)):
        context = Context(tiny_model, block_causal=context_mask == "block-causal")
        prompt = batch["input_ids"][row, batch["prompt_padding"][row] : -columns].tolist()
        seed = read_prompt(context, prompt, block_length)
        for start in range(0, columns, block_length):
            block = slice(start, start + block_length)
            if seed is not None:
                torch.testing.assert_close(by_clean[row, start], seed)
            logits = context.look(noised[row, block].tolist())[:-1]
            torch.testing.assert_close(by_noised[row, block][: block_length - 1], logits)
            seed = context.append(answer[row, block].tolist())


@pytest.mark.parametrize("block_length", [2, 4])
@pytest.mark.parametrize("context_mask", get_args(ContextMask))
def test_losses_are_those_of_decoding(
    tiny_model: LlamaForCausalLM, context_mask: ContextMask, block_length: int
) -> None:
    """Token by token of the answer: a seed, or a masked position of its block."""
    options = LossOptions(
        eos_padding_weight=0.25, weighting="inverse_t", ar_targets="seeds", context=context_mask
    )
    batch = Collator(PAD, EOS, answer_multiple=4)([texts(context_mask)])
    losses = adaptation_loss(
        tiny_model, batch, block_length, MASK, options, torch.Generator().manual_seed(3)
    )
    columns = int(batch["answer_columns"])
    answer, tail = batch["input_ids"][:, -columns:], batch["tail_length"]
    draws = torch.Generator().manual_seed(3)
    noised = noise_blocks(answer, block_length, MASK, draws, known=tail)
    total, weights, seeds = 0.0, 0.0, []
    for row in range(len(answer)):
        context = Context(tiny_model, block_causal=context_mask == "block-causal")
        prompt = batch["input_ids"][row, batch["prompt_padding"][row] : -columns].tolist()
        seed = read_prompt(context, prompt, block_length)
        length = int(batch["answer_length"][row])
        for start in range(0, columns, block_length):
            logits = context.look(noised.ids[row, start : start + block_length].tolist())
            for column in range(max(start, int(tail[row])), start + block_length):
                target = answer[row, column]
                if column == start:
                    if column < length:
                        assert seed is not None
                        seeds.append(F.cross_entropy(seed, target).item())
                elif noised.masked[row, column]:
                    weight = 1 / noised.level[row, column].item()
                    if column >= length:
                        weight *= 0.25 if start < length else 0.0
                    total += weight * F.cross_entropy(logits[column - start - 1], target).item()
                    weights += weight
            seed = context.append(answer[row, start : start + block_length].tolist())
    assert weights > 0
    torch.testing.assert_close(losses.masked.item(), total / weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.ar.item(), sum(seeds) / len(seeds), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, losses.masked + 0.5 * losses.ar)


def test_an_answer_inside_the_first_block_has_no_seed(tiny_model: LlamaForCausalLM) -> None:
    text: Example = {"input_ids": [3, 4, 5, 6, EOS], "prompt_length": 3, "tail_length": 0}
    batch = Collator(PAD, EOS, 8)([[cut_at_block(text, 8, "block-causal")]])
    options = LossOptions(ar_targets="seeds", context="block-causal")
    losses = adaptation_loss(tiny_model, batch, 8, MASK, options)
    assert losses.ar == 0 and losses.total == losses.masked


def test_prompt_is_no_target(tiny_model: LlamaForCausalLM, two_examples: list[Example]) -> None:
    """Without answers to learn from, only the seed position's next-token loss is left."""
    for example in two_examples:
        example["input_ids"] = [*example["input_ids"][: example["prompt_length"]], EOS]
    batch = Collator(PAD, EOS, answer_multiple=1)([two_examples])
    losses = adaptation_loss(tiny_model, batch, 4, MASK, LossOptions())
    assert losses.masked == 0
    torch.testing.assert_close(losses.ar, transformers_loss(tiny_model, two_examples))


def test_seeds_are_the_only_targets_without_ar_loss(
    tiny_model: LlamaForCausalLM, two_examples: list[Example], batch: Batch
) -> None:
    """Targets: tokens 0, 4, ... of an answer, in the plain model's next-token loss."""
    options = LossOptions(ar_targets="seeds")
    losses = adaptation_loss(tiny_model, batch, 4, MASK, options)
    total, targets = torch.zeros(()), 0
    for example in two_examples:
        ids, prompt = torch.tensor([example["input_ids"]]), example["prompt_length"]
        logits = tiny_model(input_ids=ids).logits[0]
        for seed in range(prompt, ids.shape[1], 4):
            total = total + F.cross_entropy(logits[seed - 1], ids[0, seed])
            targets += 1
    torch.testing.assert_close(losses.ar, total / targets)


def test_no_clean_row_of_block_causal_context_sees_its_target(
    tiny_model: LlamaForCausalLM, batch: Batch
) -> None:
    """Changing a seed changes the loss of its own prediction only through its label."""
    options = LossOptions(ar_targets="seeds", context="block-causal")
    changed: Batch = {**batch, "input_ids": batch["input_ids"].clone()}
    last_seed = -4  # columns: 8 answer tokens, blocks of 4
    changed["input_ids"][0, last_seed] = 30
    kept = []
    for one in (batch, changed):
        hidden: list[torch.Tensor] = []
        hook = tiny_model.model.register_forward_hook(
            lambda _, __, out, hidden=hidden: hidden.append(out.last_hidden_state)
        )
        adaptation_loss(tiny_model, one, 4, MASK, options, torch.Generator().manual_seed(0))
        hook.remove()
        kept.append(hidden[0][0, last_seed - 1])
    torch.testing.assert_close(kept[0], kept[1])


def test_certainty_loss_is_the_entropy_of_right_guesses(
    tiny_model: LlamaForCausalLM, batch: Batch
) -> None:
    """Against a loop; the model is first taught one batch, so that some guesses are right."""
    optimizer = torch.optim.Adam(tiny_model.parameters(), lr=1e-2)
    for _ in range(30):
        adaptation_loss(
            tiny_model, batch, 4, MASK, LossOptions(), torch.Generator().manual_seed(5)
        ).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = LossOptions(certainty_weight=2.0, eos_padding_weight=1.0)
    losses = adaptation_loss(tiny_model, batch, 4, MASK, options, torch.Generator().manual_seed(5))
    answer = batch["input_ids"][:, -8:]
    noised = noise_blocks(answer, 4, MASK, torch.Generator().manual_seed(5))
    entropies = []
    for row in range(2):
        context = Context(tiny_model)
        context.append(batch["input_ids"][row, batch["prompt_padding"][row] : -8].tolist())
        for start in range(0, int(batch["answer_length"][row]), 4):
            logits = context.look(noised.ids[row, start : start + 4].tolist())
            for i in range(1, 4):
                if (
                    noised.masked[row, start + i]
                    and logits[i - 1].argmax() == answer[row, start + i]
                ):
                    sharp = torch.distributions.Categorical(logits=logits[i - 1] / 0.5)
                    entropies.append(sharp.entropy())
            context.append(answer[row, start : start + 4].tolist())
    assert len(entropies) > 2
    torch.testing.assert_close(losses.certainty, torch.stack(entropies).mean())
    expected = losses.masked + 0.5 * losses.ar + 2 * losses.certainty
    torch.testing.assert_close(losses.total, expected)


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 20),
    block_length=st.integers(1, 8),
    seed=st.integers(0, 10_000),
)
def test_acceptance_weights_are_derivatives(
    rows: int, columns: int, block_length: int, seed: int
) -> None:
    """Of the expected length that is accepted, block by block, by the logarithm of each chance."""
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(rows, columns, generator=generator)
    weight = torch.rand(rows, columns, generator=generator).sub(0.4).clamp(min=0)
    held = (0.5 + 0.5 * probability).log().double().requires_grad_()
    expected_length = torch.zeros((), dtype=torch.float64)
    for row in range(rows):
        for start in range(0, columns, block_length):
            chance = torch.ones((), dtype=torch.float64)
            for column in range(start, min(start + block_length, columns)):
                if weight[row, column]:
                    chance = chance * held[row, column].exp()
                    expected_length = expected_length + weight[row, column].double() * chance
    if weight.any():
        expected_length.backward()
        assert held.grad is not None
        weights = acceptance_weights(probability, weight, block_length)
        torch.testing.assert_close(weights.double(), held.grad, rtol=1e-5, atol=1e-6)


def test_acceptance_weighting_is_of_the_guesses(tiny_model: LlamaForCausalLM) -> None:
    """The loss is the mean that the weights of the model's own guesses give."""
    batch = Collator(PAD, EOS, answer_multiple=4)([texts("causal")])
    draws = torch.Generator().manual_seed(3)
    options = LossOptions(weighting="acceptance", draft_share=0.5)
    losses = adaptation_loss(tiny_model, batch, 4, MASK, options, draws)
    columns = int(batch["answer_columns"])
    answer, tail = batch["input_ids"][:, -columns:], batch["tail_length"]
    draws = torch.Generator().manual_seed(3)
    noised = noise_blocks(answer, 4, MASK, draws, known=tail, draft_share=0.5)
    with torch.inference_mode():
        logits, _ = _forward(tiny_model, batch, noised.ids, 4)
    chance = torch.zeros(answer.shape)
    own = logits.float().softmax(-1).gather(2, answer[:, 1:, None])[..., 0]
    chance[:, 1:] = own
    length = batch["answer_length"][:, None]
    column = torch.arange(columns)
    weight = noised.masked * torch.where(column < length, 1.0, options.eos_padding_weight)
    weight = weight * (column // 4 <= (length - 1) // 4)
    by_place = acceptance_weights(chance, weight, 4)
    expected = -(by_place[:, 1:] * own.log()).sum() / by_place[:, 1:].sum()
    torch.testing.assert_close(losses.masked, expected)
