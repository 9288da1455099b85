# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and engines that tests share."""

import contextlib
import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from scipy.stats import chisquare
from vllm import envs

GOLDEN = Path(__file__).parent / "golden"
MASK = 511

# How long an example takes says nothing on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def _group(nodeid: str) -> str:
    """Tests that run in one process: a file's, which share engines, and all that start servers and
    clusters, which would starve each other."""
    file = nodeid.split("::")[0]
    return "servers" if file.split("/")[1] in ("serving", "fuzz", "ray") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups first: the other process has the rest meanwhile.

    Within a group, what ends the server that others share comes last.
    """
    longest = ["servers", "tests/engine/test_families.py", "tests/engine/test_warm_up.py"]
    order = {group: place for place, group in enumerate(longest)}

    def place(item: pytest.Item) -> tuple[int, bool]:
        own = order.get(_group(item.nodeid), len(longest))
        return own, item.path.name == "test_shutdown.py"

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out whole groups (xdist's own marks for that are lost on pytest 9)."""
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False  # the most tests first, however long they take
    return Groups(config, log)


@pytest.fixture(autouse=True)
def _environment_is_read_anew() -> None:
    """An engine that an earlier test started made vLLM keep the environment as it was then."""
    envs.disable_envs_cache()


@pytest.fixture(scope="session")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The `Keeper` of the one server without further flags."""
    from tests.serving.keeper import Keeper

    with Keeper(tmp_path_factory.mktemp("server")) as keeper:
        yield keeper


@pytest.fixture(scope="session")
def golden_cases() -> list[dict[str, Any]]:
    """Token ids of the reference NBDiff code on the checkpoint of `golden_checkpoint`."""
    return json.loads((GOLDEN / "nbdiff_golden.json").read_text())["cases"]


@pytest.fixture(scope="session")
def golden_checkpoint() -> Path:
    """A random 3-layer Llama of 512 tokens; mask 511, eos 510."""
    return GOLDEN / "nbdiff_tiny_llama"


@contextlib.contextmanager
def in_process() -> Iterator[None]:
    """Engines made inside run in this process: quick to start, with visible tracebacks.

    Those of earlier tests end now: freed later, they would take the process groups of a new one
    along. vLLM freezes what there is when an engine starts, which no collection frees. What is left
    is frozen, so that the many collections of a start need not look at all that is imported.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        else:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before


@pytest.fixture(scope="session")
def make_llm() -> Callable[..., Any]:
    """`make_llm(checkpoint, block_length=..., **LLM_arguments)`: an engine in this process."""

    def make(checkpoint: Path, block_length: int = 8, mask: int = MASK, **kwargs: Any) -> Any:
        from vllm import LLM

        overrides = {
            "architectures": ["NBDiffForCausalLM"],
            "block_length": block_length,
            "mask_token_id": mask,
        }
        settings: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "disable_log_stats": False,
        }
        settings |= kwargs
        overrides |= settings.pop("hf_overrides", {})
        with in_process():
            return LLM(model=str(checkpoint), hf_overrides=overrides, **settings)

    return make


def options(**extra: Any) -> dict[str, Any]:
    """`extra_args` of a request: `algorithm="margin"` becomes `nbdiff_algorithm`."""
    return {f"nbdiff_{key}": value for key, value in extra.items()}


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    """Token ids of the first completion of each request."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def counter(llm: Any, name: str) -> float:
    """Value of one of vLLM's counters."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def assert_follows(outputs: list[Any], exact: dict[tuple[int, ...], float]) -> None:
    """Chi-square test of completions against their exact probabilities."""
    counts = Counter(tuple(c.token_ids) for output in outputs for c in output.outputs)
    draws = sum(counts.values())
    assert set(counts) <= set(exact)
    frequent = [text for text, p in exact.items() if p * draws >= 5]
    observed = [counts[text] for text in frequent]
    expected = [exact[text] * draws for text in frequent]
    observed.append(draws - sum(observed))
    expected.append(draws - sum(expected))
    assert len(frequent) > 15 and chisquare(observed, expected).pvalue > 1e-3
