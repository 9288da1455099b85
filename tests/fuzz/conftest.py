# SPDX-License-Identifier: Apache-2.0
"""A server that lives, and the answers of well-behaved requests."""

import pytest

from tests.fuzz.exchange import Texts, record
from tests.serving.keeper import Keeper
from tests.serving.server import Server


@pytest.fixture
def server(keeper: Keeper) -> Server:
    """A server that lives, whatever the test before this one did."""
    return keeper.server()


@pytest.fixture(scope="package")
def expected(keeper: Keeper) -> list[Texts]:
    """The answers of the well-behaved requests, each alone on the server."""
    return record(keeper.server())
