# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the launchers: a wrong argument is a ValueError that names it, before launch.

Shapes, dtypes, devices and strides are host metadata and are always checked; where every layer of
a batch would pay for that, `once_per_layout` has the first one check for all. Values live on the
device; reading them back would synchronise, so `values_are_checked` decides who pays for that.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_LAYOUTS = 4096  # remembered by a check; of batches that differ in their sizes


def require(condition: bool, argument: str, message: str) -> None:
    """Raise ValueError("`argument`: message") unless the condition holds."""
    if not condition:
        raise ValueError(f"{argument}: {message}")


def require_tensor(
    argument: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous_last: bool = True,
) -> None:
    """Check one tensor against a shape (None: any extent), its allowed dtypes and a device."""
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, found, strict=True)
    )
    wanted = tuple("any" if want is None else want for want in shape)
    require(fits, argument, f"shape {found}, expected {wanted}")
    require(tensor.dtype in dtypes, argument, f"dtype {tensor.dtype}, expected one of {dtypes}")
    require(tensor.device == device, argument, f"on {tensor.device}, expected {device}")
    if contiguous_last and tensor.numel() > 0 and tensor.shape[-1] > 1:
        require(tensor.stride(-1) == 1, argument, "the last dimension must be contiguous")


def layout_of(argument: object) -> object:
    """All that a check knows of an argument when it reads no tensor's values; hashable."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, tuple):
        return tuple(map(layout_of, argument))
    return argument


def once_per_layout(check: Callable[..., None]) -> Callable[..., None]:
    """`check`, left out for arguments that are laid out as some that it passed; what it refuses it
    refuses again. It may read no tensor's values.
    """
    passed: set[object] = set()

    @functools.wraps(check)
    def checked(*arguments: Any) -> None:
        layout = layout_of(arguments)
        if layout in passed:
            return
        check(*arguments)
        if len(passed) >= MOST_LAYOUTS:
            passed.clear()
        passed.add(layout)

    return checked


def values_are_checked(check_values: bool | None, device: torch.device) -> bool:
    """Whether to read tensor values back: as asked; by default on CPU, where it costs no sync."""
    return device.type == "cpu" if check_values is None else check_values


def as_bytes(flags: Tensor) -> Tensor:
    """A bool tensor seen as uint8, which kernels load; others as they are."""
    return flags.view(torch.uint8) if flags.dtype == torch.bool else flags
