# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for the GPUs that we know of, and fits them; needs none."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_report.py")
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
BUFFERS = {80: "2", 90: "3", 100: "3"}


@pytest.mark.parametrize(
    "target",
    [pytest.param(80, marks=pytest.mark.long), 90, pytest.param(100, marks=pytest.mark.long)],
)
def test_every_kernel_compiles_without_spilling(target: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--targets", str(target)]
    command += ["--groups", "4", "--heads", "128"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    launches = list(csv.DictReader(run.stdout.splitlines(), delimiter="\t"))
    assert {launch["target"] for launch in launches} == {f"sm_{target}"}
    assert {launch["kernel"] for launch in launches} == {
        "_write_kv_kernel",
        "_segment_attention_kernel",
        "_cut_keys_kernel",
        "_combine_parts_kernel",
        "_partial_statistics_kernel",
        "_final_statistics_kernel",
        "_filter_bounds_kernel",
        "partial_sums_kernel",
        "_final_sample_kernel",
    }
    for launch in launches:
        assert int(launch["shared"]) <= SHARED_MEMORY[target], launch
        # fp32 attention, which is there for tests, may spill.
        assert launch["spills"] == "0" or launch["case"].startswith("fp32 4x"), launch
    canvas = [launch for launch in launches if launch["case"].startswith("bf16 4x128, 32 rows, ")]
    attention = [row["buffers"] for row in canvas if row["kernel"] == "_segment_attention_kernel"]
    assert attention == [BUFFERS[target]] * 4  # pages of 16 and 64, keys whole or cut
