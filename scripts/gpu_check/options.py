# SPDX-License-Identifier: Apache-2.0
"""What the command was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Of the command line.

    Attributes:
        toy: rehearse on a CPU, with kernels interpreted.
        model: a checkpoint to compare with stock vLLM's AR, or None.
    """

    toy: bool
    model: Path | None
