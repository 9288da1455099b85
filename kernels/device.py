# SPDX-License-Identifier: Apache-2.0
"""What launch shapes depend on of a device."""

import functools

import torch
import triton

_HOPPER_SHARED_MEMORY = 227 * 1024


@functools.cache
def multiprocessor_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device, 1 for the CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may take; the interpreter runs the shapes of a Hopper GPU."""
    if device.type != "cuda":
        return _HOPPER_SHARED_MEMORY
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@functools.cache
def device_name(device: torch.device) -> str:
    """What the driver calls a CUDA device; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
