# SPDX-License-Identifier: Apache-2.0
"""What is refused of an HTTP body before vLLM reads its fields."""

from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_nbdiff.body import check_body

BODY = {"model": "m", "prompt": [[5, 6], [7]], "vllm_xargs": {"nbdiff_mode": "ar"}, "stop": None}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("prompt", {"prompt": "\ud800"}),
        ("prompt", {"prompt": ["fine", "\ud800"]}),
        ("messages", {"messages": [{"role": "user", "content": [{"text": "\udc00"}]}]}),
        ("request_id", {"request_id": "\ud800"}),
        ("vllm_xargs", {"vllm_xargs": {"\ud800": 1}}),
        ("kv_transfer_params", {"kv_transfer_params": {"a": {"b": ["\ud800"]}}}),
        ("use_beam_search", {"use_beam_search": True, "stream": True}),
        ("structured_outputs", {"structured_outputs": 5}),
        ("structured_outputs", {"structured_outputs": [None]}),
        ("structured_outputs", {"structured_outputs": "regex"}),
        ("messages", {"messages": 5}),
        ("messages", {"messages": None}),
    ],
)
def test_refused_by_name(name: str, body: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError, match=f"^{name} ") as error:
        check_body(BODY | body)
    assert error.value.parameter == name
    str(error.value).encode()


@pytest.mark.parametrize(
    "body",
    [
        BODY,
        CHAT,
        BODY | {"use_beam_search": False, "structured_outputs": None},
        BODY | {"structured_outputs": {"regex": "a"}},
        BODY | {"structured_outputs": StructuredOutputsParams(regex="a")},
        BODY | {"\ud800": 1},
        5,
        None,
        ["prompt"],
    ],
)
def test_left_to_vllm(body: Any) -> None:
    """Unchanged; a field that nobody knows is ignored."""
    assert check_body(body) is body
