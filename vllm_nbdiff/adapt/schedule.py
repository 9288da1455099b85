# SPDX-License-Identifier: Apache-2.0
"""What holds at which optimizer step: block length (NBDiff), certainty loss (dParallel)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_nbdiff.adapt.loss import LossOptions


@dataclass(frozen=True)
class BlockGrowth:
    """``b(s) = min(final, initial * ratio ** floor(max(0, s - start) / interval))``.

    Args:
        interval: Optimizer steps between two growths.
        start: Step at which the first interval begins.
        initial: Block length at step 0; 1 is next-token prediction.
        ratio: Factor of one growth.
        final: Block length that is served.
    """

    interval: int
    start: int = 0
    initial: int = 1
    ratio: int = 2
    final: int = 32

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {self.interval}")
        if self.ratio < 2:
            raise ValueError(f"ratio must be at least 2, got {self.ratio}")
        if not 1 <= self.initial <= self.final:
            raise ValueError(f"need 1 <= initial <= final, got {self.initial} and {self.final}")

    def __call__(self, step: int) -> int:
        """Block length at optimizer step ``step``."""
        growths = max(0, step - self.start) // self.interval
        length = self.initial
        for _ in range(growths):
            if length >= self.final:
                break
            length *= self.ratio
        return min(self.final, length)


@dataclass(frozen=True)
class Schedule:
    """The stages of one run.

    Args:
        growth: Block length by step: a :class:`BlockGrowth`, or any other rule.
        certainty_from: First step of the last stage, the only one with a certainty loss.
    """

    growth: Callable[[int], int]
    certainty_from: int

    def block_length(self, step: int) -> int:
        """Block length at optimizer step ``step``."""
        return self.growth(step)

    def loss_options(self, step: int, options: LossOptions) -> LossOptions:
        """``options`` as they hold at ``step``."""
        if step >= self.certainty_from:
            return options
        return replace(options, certainty_weight=0.0)
