# SPDX-License-Identifier: Apache-2.0
"""What the plugin touches of vLLM is there, and a release that changes it is found out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.contract import release, reviewed
from scripts.contract.__main__ import contract_of, problems_of
from scripts.contract.check import Contract
from vllm_nbdiff.versions import SUPPORTED_VLLM

NAME, INSTALLED = release.installed()


@pytest.fixture(scope="module")
def contract() -> Contract:
    """That of the installed release."""
    return contract_of(INSTALLED)


def test_the_installed_release(contract: Contract) -> None:
    assert problems_of(contract, NAME) == []
    # The list is that of the code: something of every kind, and of the last patch that was written.
    touched = {(row.kind, row.what.rpartition(".")[2]) for row in contract.rows}
    assert touched >= {
        ("import", "is_quantized_kv_cache"),
        ("field", "num_draft_tokens_per_req"),
        ("field", "kv_cache_groups"),
        ("call", "build_attn_metadata"),
        ("override", "prepare_attn"),
        ("patch", "use_v2_model_runner"),
        ("kernel", "_post_update_kernel"),
        ("upstream", "warmup_kernels"),
        ("order", "execute_model"),
    }


def test_every_supported_release_was_read(contract: Contract) -> None:
    """Releases that are not installed here are checked by `make contract`."""
    places = reviewed.load()
    for major, minor in SUPPORTED_VLLM:
        assert all(f"{major}.{minor}.0" in read for read in places.values())
    assert places.keys() == contract.texts.keys()


# The kind of difference, the file, and a change to it: as releases make them.
CHANGES: dict[str, tuple[str, str, str, str]] = {
    "a moved function": (
        "import",
        "v1/kv_cache_interface.py",
        "def is_quantized_kv_cache(",
        "def is_quantized(",
    ),
    "a renamed field": (
        "field",
        "v1/worker/gpu/input_batch.py",
        "    num_draft_tokens_per_req:",
        "    num_drafts_per_req:",
    ),
    "a new field of what is read": (
        "field",
        "v1/attention/backend.py",
        "    query_start_loc: ",
        "    query_starts: ",
    ),
    "a parameter that is gone": (
        "call",
        "v1/worker/gpu/attn_utils.py",
        "    max_seq_len: int,",
        "    longest: int,",
    ),
    "a parameter of what is overridden": (
        "override",
        "v1/worker/gpu/model_states/interface.py",
        "        for_capture: bool = False,",
        "        for_capture: bool = False,\n        capture_again: bool = False,",
    ),
    "a function that another class defines": (
        "patch",
        "v1/worker/gpu/structured_outputs.py",
        "    def apply_grammar_bitmask(",
        "    def apply_bitmask(",
    ),
    "an argument of a kernel": (
        "kernel",
        "v1/worker/gpu/block_table.py",
        "            BLOCK_SIZE=1024,  # type: ignore\n        )\n        return tuple(bt",
        "            DRAFT=1,\n            BLOCK_SIZE=1024,\n        )\n        return tuple(bt",
    ),
    "a place that is gone": (
        "upstream",
        "v1/worker/gpu/warmup.py",
        "def warmup_kernels(",
        "def warm_up_kernels(",
    ),
    "another order of calls": (
        "order",
        "v1/worker/gpu/model_runner.py",
        "attn_metadata = self.model_state.prepare_attn(",
        "attn_metadata = self.model_state.prepare_inputs(",
    ),
    "another body": (
        "text",
        "v1/core/sched/async_scheduler.py",
        "self.kv_cache_manager.cache_blocks(",
        "self.kv_cache_manager.cache_full_blocks(",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_copy_differs(
    name: str, contract: Contract, changed: Callable[[str, str, str], Path]
) -> None:
    kind, file, old, new = CHANGES[name]
    found = problems_of(contract_of(changed(file, old, new)), NAME)
    assert kind in {row.kind for row in found}


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """A copy of the installed release's Python files, as links, with one of them changed."""

    def change(file: str, old: str, new: str) -> Path:
        package = tmp_path / "vllm"
        for folder in {path.parent for path in INSTALLED.rglob("*.py")}:
            (package / folder.relative_to(INSTALLED)).mkdir(parents=True, exist_ok=True)
        for path in INSTALLED.rglob("*.py"):
            (package / path.relative_to(INSTALLED)).symlink_to(path)
        text = (INSTALLED / file).read_text(encoding="utf-8")
        assert old in text
        (package / file).unlink()
        (package / file).write_text(text.replace(old, new), encoding="utf-8")
        return package

    return change


def test_a_release_is_to_be_read_where_its_text_differs() -> None:
    read = {"a.f": {"0.32.0": "1", "0.33.0": "2"}}
    assert reviewed.differences(read, "0.33.0", {"a.f": "2"}) == {}
    assert reviewed.differences(read, "0.34.0", {"a.f": "2"}) == {}
    assert "0.33.0" in reviewed.differences(read, "0.34.0", {"a.f": "3"})["a.f"]
    assert "0.33.0" in reviewed.differences(read, "0.33.0", {"a.f": "1"})["a.f"]
    assert "not read" in reviewed.differences(read, "0.33.0", {"a.f": "2", "a.g": "1"})["a.g"]


def test_what_was_read_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "reviewed.json"
    reviewed.accept({"gone": {"0.32.0": "1"}, "a": {"0.32.0": "1"}}, "0.33.0", {"a": "2"}, file)
    assert json.loads(file.read_text()) == {"a": {"0.32.0": "1", "0.33.0": "2"}}
