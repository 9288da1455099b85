# SPDX-License-Identifier: Apache-2.0
"""Ends, limits and standard sampling parameters of requests, on one engine."""

from collections.abc import Callable
from time import sleep
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.conftest import counter
from vllm_nbdiff.engine import constraints
from vllm_nbdiff.reference import generate

VOCAB, MASK, LENGTH, MAX_LEN = 160, 159, 8, 96
PROMPT = [5, 17, 3, 99, 42]


@pytest.fixture(scope="module")
def served(make_checkpoint: Callable[..., Any], make_llm: Callable[..., Any]) -> tuple[Any, Any]:
    folder, model = make_checkpoint("llama", VOCAB, seed=1)
    return make_llm(
        folder, block_length=LENGTH, mask=MASK, max_model_len=MAX_LEN, block_size=32
    ), model


def run(llm: Any, prompt: list[int] = PROMPT, **arguments: Any) -> Any:
    """The completion of one greedy request without eos."""
    defaults = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    params = SamplingParams(**(defaults | arguments))
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return output.outputs[0]


def forwards(llm: Any) -> float:
    name = "vllm:diffusion_num_denoising_steps"
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.mark.parametrize("max_tokens", [1, 7, 8, 9, 23])
def test_max_tokens_need_not_be_a_multiple_of_the_block(
    served: tuple[Any, Any], max_tokens: int
) -> None:
    completion = run(served[0], max_tokens=max_tokens)
    assert list(completion.token_ids) == list(run(served[0]).token_ids)[:max_tokens]
    assert completion.finish_reason == "length"


def test_max_model_len_cuts_the_last_block(served: tuple[Any, Any]) -> None:
    llm, model = served
    prompt = [(7 * i) % VOCAB for i in range(MAX_LEN - 21)]
    completion = run(llm, prompt, max_tokens=None)
    assert len(completion.token_ids) == 21 and completion.finish_reason == "length"
    expected = generate(
        model, prompt, max_tokens=16, mask_token_id=MASK, eos_token_ids=[], block_length=LENGTH,
        num_small_blocks=1,
    )  # fmt: skip
    assert list(completion.token_ids)[:16] == expected.token_ids
    assert MASK not in completion.token_ids


def test_stop_token_inside_a_block(served: tuple[Any, Any]) -> None:
    full = list(run(served[0]).token_ids)
    at = next(i for i in range(9, 24) if full[i] not in full[:i])
    completion = run(served[0], stop_token_ids=[full[at]])
    assert list(completion.token_ids) == full[: at + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", full[at])


def test_min_tokens_holds_stop_tokens_back(served: tuple[Any, Any]) -> None:
    full = list(run(served[0]).token_ids)
    stop = full[2]
    completion = run(served[0], stop_token_ids=[stop], min_tokens=12)
    tokens = list(completion.token_ids)
    assert len(tokens) >= 12 and stop not in tokens[:12]


def test_logit_bias_and_allowed_token_ids(served: tuple[Any, Any]) -> None:
    assert set(run(served[0], logit_bias={77: 100.0}).token_ids) == {77}
    assert set(run(served[0], allowed_token_ids=[4, 8, 15]).token_ids) <= {4, 8, 15}


def test_repetition_penalty_sees_prompt_output_and_canvas(served: tuple[Any, Any]) -> None:
    tokens = list(run(served[0], repetition_penalty=100.0).token_ids)
    plain = list(run(served[0]).token_ids)
    assert len(set(plain)) < len(plain)
    assert len(set(tokens)) == len(tokens) and not set(tokens) & set(PROMPT)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_bad_words(served: tuple[Any, Any], threshold: float) -> None:
    """Also where all positions of a sub-block are filled at once."""
    llm = served[0]
    extra = {"nbdiff_threshold": threshold}
    plain = list(run(llm, extra_args=extra).token_ids)
    pairs = {tuple(plain[i : i + 2]) for i in range(len(plain) - 1)}
    params = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, extra_args=extra
    )
    # With a tokenizer vLLM derives these from `bad_words`.
    params._bad_words_token_ids = [list(pair) for pair in pairs] + [[plain[-1]]]
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    assert len(tokens) == 24 and plain[-1] not in tokens
    assert not pairs & {tuple(tokens[i : i + 2]) for i in range(23)}


def test_max_steps_is_the_number_of_denoise_steps(served: tuple[Any, Any]) -> None:
    llm = served[0]
    for steps in (1, 3, 7):
        before = forwards(llm)
        extra = {"nbdiff_threshold": 1.0, "diffusion_max_steps": steps}
        run(llm, max_tokens=3 * LENGTH, extra_args=extra)
        # The last block needs no commit.
        assert forwards(llm) - before == 3 * (steps + 1) - 1


def test_a_request_ends_as_soon_as_its_last_token_is_certain(served: tuple[Any, Any]) -> None:
    llm = served[0]
    extra = {"nbdiff_threshold": 1.0, "nbdiff_small_blocks": 4}
    full = list(run(llm, extra_args=extra).token_ids)
    before = forwards(llm)
    run(llm, max_tokens=LENGTH + 3, extra_args=extra)
    # One block and its commit, then the seed and the first sub-block with one position each, and
    # of the second, where the order is free, one or two.
    assert forwards(llm) - before in (LENGTH + 2, LENGTH + 3)
    at = next(i for i in range(LENGTH, 24) if full[i] not in full[:i])
    before = forwards(llm)
    tokens = list(run(llm, stop_token_ids=[full[at]], extra_args=extra).token_ids)
    assert tokens == full[: at + 1]
    assert forwards(llm) - before < LENGTH * (at // LENGTH + 1)


def test_pages_of_an_uncommitted_block_are_not_cached(served: tuple[Any, Any]) -> None:
    """A request that ended early, then its text as the prompt of another."""
    llm, model = served
    prompt = [(11 * i) % 150 for i in range(25)]
    first = list(run(llm, prompt, max_tokens=20).token_ids)
    longer = prompt + first
    expected = generate(
        model, longer, max_tokens=16, mask_token_id=MASK, eos_token_ids=[], block_length=LENGTH,
        num_small_blocks=1,
    )  # fmt: skip
    for _ in range(2):
        assert list(run(llm, longer, max_tokens=16).token_ids) == expected.token_ids


def test_bad_requests_are_refused_and_the_engine_lives_on(served: tuple[Any, Any]) -> None:
    llm = served[0]
    before = list(run(llm).token_ids)
    for arguments, name in [
        ({"extra_args": {"nbdiff_algorithm": "best"}}, "nbdiff_algorithm"),
        ({"extra_args": {"nbdiff_block_length": 16}}, "nbdiff_block_length"),
        ({"extra_args": {"nbdiff_small_blocks": 3}}, "nbdiff_small_blocks"),
        ({"extra_args": {"nbdiff_speed": 1}}, "nbdiff_speed"),
        ({"logprobs": 2000}, "logprobs"),
    ]:
        with pytest.raises(VLLMValidationError, match=name):
            run(llm, **arguments)
    with pytest.raises(VLLMValidationError, match="mask token"):
        run(llm, [1, MASK, 2])
    assert list(run(llm).token_ids) == before


def test_penalties_are_computed_in_pieces(
    served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows fit in one, the text is the same, and not that without them."""
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    whole = run(served[0], **penalties).token_ids
    monkeypatch.setattr(constraints, "_CHUNK", 1)
    assert run(served[0], **penalties).token_ids == whole != run(served[0]).token_ids


def test_a_chosen_width_holds_from_the_first_canvas_on(
    served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the schedule that it is chosen in: with width 1 nothing is ever drafted."""
    llm, drafted = served[0], "vllm:diffusion_num_drafted_tokens"
    text, extra = run(llm, extra_args={"nbdiff_mode": "ar"}).token_ids, {"nbdiff_mode": "auto"}
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    chooser = worker.model_runner.model_state.loop.auto.chooser
    monkeypatch.setattr(chooser, "choose", lambda *given: LENGTH)
    before = counter(llm, drafted)
    assert run(llm, extra_args=extra).token_ids == text and counter(llm, drafted) > before
    monkeypatch.setattr(chooser, "choose", lambda *given: 1)
    before = counter(llm, drafted)
    assert run(llm, extra_args=extra).token_ids == text and counter(llm, drafted) == before


def test_the_first_forward_of_a_schedule_teaches_what_rows_cost(
    served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one takes all of a schedule's time there is no other; prompts teach nothing."""
    llm = served[0]
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    loop, learned = worker.model_runner.model_state.loop, []
    monkeypatch.setattr(loop, "seconds_per_schedule", 0.0)
    monkeypatch.setattr(loop.auto.chooser, "choose", lambda *given: 1)
    monkeypatch.setattr(loop.auto.chooser.cost, "observe", lambda *given: learned.append(given))
    before = forwards(llm)
    run(llm, extra_args={"nbdiff_mode": "auto"})
    assert len(learned) == forwards(llm) - before > 10
    assert all(rows == 1 and seconds > 0 for rows, seconds in learned)


def test_a_schedule_ends_in_time(served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward begins after a schedule's time: then the scheduler sees who came and who left."""
    llm = served[0]
    core = llm.llm_engine.engine_core.engine_core
    loop = core.model_executor.driver_worker.worker.model_runner.model_state.loop
    schedule, count = core.scheduler.schedule, []
    monkeypatch.setattr(core.scheduler, "schedule", lambda *a: count.append(1) or schedule(*a))

    def schedules() -> tuple[float, Any]:
        """Forwards beyond one a schedule, and the text."""
        count.clear()
        before, tokens = forwards(llm), run(llm).token_ids
        return (forwards(llm) - before) - len(count), tokens

    most, tokens = schedules()
    monkeypatch.setattr(loop, "seconds_per_schedule", 0.0)
    least, same = schedules()
    # A prompt's schedule has no forward of a canvas.
    assert most > 0 >= least and same == tokens

    forward = loop.model.forward
    monkeypatch.setattr(loop.model, "forward", lambda **given: sleep(0.02) or forward(**given))
    monkeypatch.setattr(loop, "seconds_per_schedule", 0.02)
    slow, same = schedules()  # the first forward counts
    assert slow <= 0 and same == tokens
