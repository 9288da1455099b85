# SPDX-License-Identifier: Apache-2.0
"""How the kernel benchmarks time a run on a GPU, and the copy bandwidth they compare with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import triton

Run = Callable[[], object]
Measure = Callable[[Run], float]


def seconds_on_gpu(run: Run) -> float:
    """Median time of a CUDA-graph replay, the L2 cache flushed before each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and settles the allocator before the capture
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return float(triton.testing.do_bench(graph.replay, return_mode="median")) * 1e-3


def seconds_on_cpu(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_of(device: str) -> Measure:
    return seconds_on_gpu if device == "cuda" else seconds_on_cpu


def copy_bandwidth(device: str) -> float:
    """Bytes per second read and written by a large copy, of data that no memory compresses."""
    elements = 2**30 if device == "cuda" else 2**20
    source = torch.randint(256, (elements,), dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * elements / measure_of(device)(lambda: target.copy_(source))


def fits(num_bytes: int, device: str) -> bool:
    """Whether so much memory is free on a GPU, with a tenth to spare; true on a CPU."""
    if device != "cuda":
        return True
    torch.cuda.empty_cache()
    return num_bytes * 1.1 <= torch.cuda.mem_get_info()[0]


def describe(device: str) -> str:
    """The device and the versions a time depends on."""
    where = "CPU, interpreter: times mean nothing"
    name = torch.cuda.get_device_name() if device == "cuda" else where
    return f"{name}; torch {torch.__version__}, triton {triton.__version__}"
