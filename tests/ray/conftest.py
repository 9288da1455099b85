# SPDX-License-Identifier: Apache-2.0
"""A small Ray cluster for the examples."""

import os
from collections.abc import Iterator

import pytest
import ray

# Ray's workers run at nice 15: beside another busy process they would hardly run at all.
os.environ |= {"RAY_worker_niceness": "0"}


@pytest.fixture(scope="module")
def ray_environment() -> Iterator[dict[str, str]]:
    """Environment of a process that is to join the cluster instead of starting its own."""
    with pytest.MonkeyPatch.context() as patch:
        # vLLM's worker in the engine's process: one process less to start for each.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        ray.init(num_cpus=2, object_store_memory=200 << 20, include_dashboard=False)
        yield {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        ray.shutdown()
