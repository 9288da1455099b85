# SPDX-License-Identifier: Apache-2.0
"""How prompts and canvases share the tokens of a schedule."""


class PrefillShare:
    """Half of the token budget for prompts, where they and canvases want more than all of it.

    Canvases are not split, so prompts may get more than half while some are held back; what they
    do, the canvases get in the next schedule. Beside the other kind neither takes more than about
    twice as long as alone.
    """

    def __init__(self, budget: int, chunk: int = 1) -> None:
        """
        Args:
            budget: tokens of a schedule.
            chunk: prompts are computed in multiples of so many tokens.
        """
        self.budget = budget
        self.chunk = chunk
        self._owed = 0

    def reserve(self, wanted: int) -> int:
        """Tokens of the coming schedule that canvases leave to prompts, which want `wanted`."""
        half = self.budget // 2
        self._owed = min(self._owed + half, max(half, self.chunk), wanted)
        # Less than a chunk is of no use to them: it adds up.
        return self._owed if self._owed >= min(self.chunk, max(wanted, 1)) else 0

    def settle(self, used: int) -> None:
        """Account for the tokens that prompts got while canvases were held back for them."""
        self._owed -= used
