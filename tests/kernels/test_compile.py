# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for sm_90; needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("compile_for_hopper.py")
SHARED_MEMORY_PER_SM = 227 * 1024


def test_every_kernel_compiles_for_hopper_without_spilling() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    launches = [line.split() for line in run.stdout.splitlines()]
    assert {kernel for kernel, *_ in launches} == {
        "_write_kv_kernel",
        "_segment_attention_kernel",
        "_combine_splits_kernel",
        "_partial_statistics_kernel",
        "_final_statistics_kernel",
        "_filter_bounds_kernel",
        "partial_sums_kernel",
        "_final_sample_kernel",
    }
    for kernel, _, stack_bytes, shared_bytes in launches:
        assert int(stack_bytes) == 0, kernel
        assert int(shared_bytes) <= SHARED_MEMORY_PER_SM, kernel
