# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzzer: the long one is `python -m tests.fuzz`."""

from tests.fuzz import bodies, exchange
from tests.fuzz.exchange import Texts
from tests.serving.keeper import Keeper

BODIES = 60
SEED = 4  # of the first few, the one whose bodies reach furthest
GROUP = 4


def test_nothing_hurts_the_server_or_others(keeper: Keeper, expected: list[Texts]) -> None:
    """Every body is answered in time, never with HTTP 500; a refusal names its field."""
    calls = bodies.generate(BODIES, SEED)
    wrong: list[str] = []
    for start in range(0, BODIES, GROUP):
        wrong += exchange.send(keeper.server(), calls[start : start + GROUP], expected)[1]
    assert not wrong, keeper.report(wrong)
