# SPDX-License-Identifier: Apache-2.0
"""Step maps in the front end; a test named `test_..._is_needed` that fails means that a patch can
go."""

import numpy as np
import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.compat.conftest import stock
from vllm_nbdiff.compat import pack_steps


def completion(tokens: list[int], step_map: list[int] | None) -> CompletionOutput:
    output = CompletionOutput(0, "", tokens, None, None)
    output.step_map = step_map
    return output


def request(*outputs: CompletionOutput) -> RequestOutput:
    return RequestOutput("0", None, [1], None, list(outputs), False)


def test_patch_is_needed() -> None:
    """Pieces that wait for their client are merged; vLLM alone knows no step maps."""
    for merge, expected in ((stock(RequestOutput, "add"), [-1]), (RequestOutput.add, [-1, 0, 2])):
        first = request(completion([5], [-1]))
        merge(first, request(completion([6, 7], [0, 2])), aggregate=True)
        assert first.outputs[0].token_ids == [5, 6, 7]
        assert first.outputs[0].step_map == expected
    assert not {"step_map", "extra", "metadata"} & set(EngineCoreOutput.__struct_fields__)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_steps_become_those_of_an_output(kind: RequestOutputKind) -> None:
    """Masks of tokens stay what they are."""
    state = RequestState.__new__(RequestState)
    state.output_kind, state.request_index, state.spec_decode_metrics = kind, 0, None
    state.routed_experts_chunks, state.weight_version_starts = [], []

    class Nothing:
        logprobs = cumulative_logprob = None
        output_token_ids = (4, 5, 6)

        def get_next_output_text(self, finished: bool, delta: bool) -> str:
            return ""

        def num_output_tokens(self) -> int:
            return 3

    state.detokenizer = state.logprobs_processor = Nothing()  # type: ignore[assignment]
    packed = [pack_steps(np.array(steps)) for steps in ([-1, 0], [3])]
    sent = MsgpackEncoder().encode(EngineCoreOutput("0", [4], new_sampling_mask=packed[0]))
    arrived = MsgpackDecoder(EngineCoreOutput).decode(sent).new_sampling_mask
    state.sampling_mask_chunks = [arrived.slice_request(0, 2), packed[1]]
    output = state._new_completion_output([4, 5, 6], None, None)
    assert output.step_map == [-1, 0, 3] and output.sampling_mask is None
    state.sampling_mask_chunks = [packed[0]._replace(token_ids=np.array([7, 8]))]
    masked = stock(RequestState, "_new_completion_output")(state, [4, 5], None, None)
    state.sampling_mask_chunks = [packed[0]._replace(token_ids=np.array([7, 8]))]
    same = state._new_completion_output([4, 5], None, None)
    assert same.step_map is None and same.sampling_mask == masked.sampling_mask
