# SPDX-License-Identifier: Apache-2.0
"""What forwards cost comes to the scheduler by a way of its own; NaNs are NaNs."""

import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams, envs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from tests.conftest import counter, tokens_of
from vllm_nbdiff import compat
from vllm_nbdiff.engine.counts import CountedOutput, Counts, Tally, count_nans

COLUMNS = torch.arange(22).view(11, 2)


class Recorder:
    """Stands in for streams and events; notes what is done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.done: list[str] = []

    def record(self, stream: "Recorder") -> None:
        stream.done.append("record")

    def wait_stream(self, _: "Recorder") -> None:
        self.done.append("wait")

    def synchronize(self) -> None:
        pass


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Callable[[SamplerOutput], tuple[Any, list[str]]]:
    """What the engine gets of a sampler's output for requests "a" and "b"; steps of the copy."""
    compat.carry_counts()
    monkeypatch.setattr(torch.cuda, "Event", Recorder)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)

    def copy(sampled: SamplerOutput) -> tuple[Any, list[str]]:
        side: Any = Recorder()
        copied = AsyncOutput(
            model_runner_output=ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1}),
            sampler_output=sampled,
            num_sampled_tokens=sampled.num_sampled,
            main_stream=Recorder(),
            copy_stream=side,
            check_ep_fault=False,
            pending_aux_output=None,
        )
        sampled.sampled_token_ids.zero_()
        if isinstance(sampled, CountedOutput) and sampled.counts is not None:
            sampled.counts.zero_()
        return pickle.loads(pickle.dumps(copied.get_output())), side.done

    return copy


def sampled(**extra: Any) -> Any:
    """One token for each of two requests."""
    tokens, one = torch.tensor([[5], [6]]), torch.ones(2, dtype=torch.int32)
    return (CountedOutput if extra else SamplerOutput)(tokens, None, None, one, 0 * one, **extra)


def test_counts_reach_the_scheduler(copied: Callable[..., Any]) -> None:
    """Copied before the event that ends the copies, and unchanged in another process."""
    output, steps = copied(sampled(counts=COLUMNS.T.int(), graph="full"))
    assert output.sampled_token_ids == [[5], [6]] and output.num_nans_in_logits is None
    got = {name: Counts(*row) for name, row in compat.counts_of(output).items()}
    assert got["a"] == Counts(*range(0, 22, 2)) and got["b"].accepted == 13
    assert compat.graph_of(output) == "full"
    assert steps == ["wait", "wait", "record"]


def test_tally() -> None:
    """Requests: one decodes alone, one with a second segment, one computes a prompt."""
    decodes = torch.tensor([True, True, False])
    tally = Tally(verifies=torch.tensor([True, False, True]))
    tally.add_forward(torch.tensor([[1, 0], [8, 8], [20, 0]]))
    tally.add_forward(torch.tensor([[8, 0], [8, 0], [0, 0]]))
    tally.add_guesses(decodes, torch.tensor([False, True, False]))
    tally.add_texts(torch.tensor([5, 8, 0]), torch.tensor([5, 8, 0]))
    tally.add_texts(torch.tensor([4, 0, 0]), torch.tensor([2, 0, 0]))
    tally.add_fan_outs(torch.tensor([3, 0, 0]), torch.tensor([True, False, False]))
    assert tally.columns(decodes)[:, -2:].tolist() == [[0, 0]] * 3
    tally.add_broken(torch.tensor([0, 2, 0]))
    tally.add_broken(torch.tensor([0, 1, 1]))
    tally.add_stuck(torch.tensor([1, 0, 0]))
    counts = tally.columns(decodes)
    assert counts.dtype == torch.int32
    got = [Counts(*row) for row in counts.tolist()]
    assert got[0] == Counts(2, 9, 1, 0, 1, 7, 5, 3, 1, 0, 1)
    assert got[1] == Counts(2, 24, 1, 1, 0, 0, 0, 0, 0, 3, 0)
    assert got[2] == Counts(0, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0)


def test_outputs_of_other_models_stay_as_they_are(copied: Callable[..., Any]) -> None:
    output, steps = copied(sampled())
    assert vars(output).keys() == {field.name for field in fields(ModelRunnerOutput)}
    assert compat.counts_of(output) == {} and compat.graph_of(output) is None
    assert steps == ["wait", "record"]


def test_carrying_counts_is_needed() -> None:
    """A sampler's output has no field that a model state may use for its own."""
    assert {field.name for field in fields(SamplerOutput)} == {
        "sampled_token_ids",
        "logprobs_tensors",
        "num_nans",
        "num_sampled",
        "num_rejected",
        "sampling_mask_tensors",
    }


def test_nans_of_every_request() -> None:
    logits = torch.zeros(5, 7)
    logits[0, 3] = logits[1, :2] = logits[4] = torch.nan
    logits[3] = -torch.inf
    owner = torch.tensor([2, 0, 0, 1, 2])
    assert count_nans(logits, owner, num_reqs=4).tolist() == [2, 0, 8, 0]


def test_only_nans_raise(
    golden_checkpoint: Path, make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`VLLM_RAISE_ON_LOGIT_NANS` leaves a healthy engine alone, and ends one without sense."""
    for name in ("VLLM_COMPUTE_NANS_IN_LOGITS", "VLLM_RAISE_ON_LOGIT_NANS"):
        monkeypatch.setattr(envs, name, True, raising=False)
    llm = make_llm(golden_checkpoint)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": [1, 2, 3]}
    assert len(tokens_of(llm.generate([prompt], params, use_tqdm=False))[0]) == 20
    assert counter(llm, "vllm:diffusion_num_denoising_steps") > 0

    llm.apply_model(lambda model: next(model.parameters()).data.fill_(torch.nan))
    with pytest.raises(RuntimeError, match="NaNs detected in logits"):
        llm.generate([prompt], params, use_tqdm=False)
