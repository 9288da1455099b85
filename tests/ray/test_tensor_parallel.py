# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel 2 gives the reference's tokens, on vLLM's own executor and on Ray's.

Each runs in a process of its own: vLLM chooses the platform once a process, and Ray's executor
needs one that pretends to have devices (`cpu_for_ray`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ALGORITHMS = {"origin": "confidence", "confidence_threshold": "confidence", "entropy": "entropy"}
BLOCK_LENGTH = 8


@pytest.fixture(scope="module")
def platform_plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which vLLM finds `cpu_for_ray` installed."""
    site = tmp_path_factory.mktemp("site")
    installed = site / "cpu_for_ray-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-for-ray\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\ncpu_for_ray = cpu_for_ray:activate\n"
    )
    return f"{site}{os.pathsep}{HERE / 'cpu_for_ray'}"


def request_of(case: dict[str, Any]) -> dict[str, Any]:
    """One golden case for `generate_tp2.py`."""
    has_threshold = case["algorithm"] == "confidence_threshold"
    return {
        "prompt": case["prompt"],
        "max_tokens": 32,
        "extra_args": {
            "nbdiff_algorithm": ALGORITHMS[case["algorithm"]],
            "nbdiff_threshold": case["threshold"] if has_threshold else 1.0,
            "nbdiff_small_blocks": case["small_blocks"],
        },
    }


@pytest.mark.parametrize(
    ("executor", "decoder"), [("mp", "host"), ("ray", "host"), ("mp", "device")]
)
def test_golden_with_two_workers(
    executor: str,
    decoder: str,
    platform_plugin: str,
    golden_checkpoint: Path,
    golden_cases: list[dict[str, Any]],
) -> None:
    cases = [case for case in golden_cases if case["block_length"] == BLOCK_LENGTH]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # By default each worker wants cores of its own, which a small machine does not have.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if executor == "ray":
        environment["PYTHONPATH"] = platform_plugin
    if decoder == "device":  # kernels in Triton's interpreter, which takes its time
        environment["TRITON_INTERPRET"] = "1"
        cases = cases[::10]
    run = subprocess.run(
        [sys.executable, str(HERE / "generate_tp2.py"), executor, decoder, str(golden_checkpoint)],
        input=json.dumps([request_of(case) for case in cases]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    answers = [line for line in run.stdout.splitlines() if line.startswith("[[")]
    assert run.returncode == 0 and len(answers) == 1, run.stdout[-3000:] + run.stderr[-3000:]
    assert json.loads(answers[0]) == [case["expected"] for case in cases]
    assert ("Started a local Ray instance" in run.stderr) == (executor == "ray")
