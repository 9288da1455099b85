# SPDX-License-Identifier: Apache-2.0
"""What would have the host wait for a GPU, seen on any device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NoSynchronisation(TorchFunctionMode):
    """Raises where the host would wait for the device: for a value or a shape that only it knows,
    or for a copy of what the host has.

    vLLM's `async_tensor_h2d`, which does not wait, writes to a host that it calls "cpu".
    """

    READS = (
        *("cpu", "item", "tolist", "numpy", "nonzero", "unique", "masked_select", "argwhere"),
        *("is_nonzero", "equal", "allclose", "__bool__", "__int__", "__float__", "__index__"),
    )
    COPIES = ("tensor", "as_tensor", "scalar_tensor", "new_tensor", "cuda")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        assert name not in self.READS, f"{name} waits for the device"
        if name in self.COPIES:
            assert kwargs.get("device") in (None, "cpu"), f"{name} copies and waits"
        if name in ("to", "copy_"):
            others = [*args[1:], *kwargs.values()]
            moves = any(isinstance(other, torch.device | str | Tensor) for other in others)
            alike = name == "copy_" and args[0].device == args[1].device
            assert alike or not moves or kwargs.get("non_blocking"), f"{name} copies and waits"
        if name in ("__getitem__", "__setitem__"):
            self._check_index(*args)
        if name == "repeat_interleave":
            assert "output_size" in kwargs, "repeat_interleave asks the device for its size"
        return func(*args, **kwargs)

    @staticmethod
    def _check_index(table: Tensor, index: Any, *values: Any) -> None:
        """Of what is read, or written with `values`."""
        index = index if isinstance(index, tuple) else (index,)
        tensors = [one for one in index if isinstance(one, Tensor)]
        flags = [one for one in tensors if one.dtype == torch.bool]
        assert not flags, "an index of flags has a shape that only the device knows"
        numbers = [one for one in index if isinstance(one, list | np.ndarray)]
        assert not numbers, "an index of the host copies and waits"
        operands = [*tensors, *(value for value in values if isinstance(value, Tensor))]
        assert all(one.device == table.device for one in operands), "the host's numbers are copied"
        if tensors and values:
            assert isinstance(values[0], Tensor), "a number that is set by index is copied"
