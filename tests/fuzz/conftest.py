# SPDX-License-Identifier: Apache-2.0
"""One server for all tests of this folder, started again where a test has killed it."""

from collections.abc import Iterator

import pytest

from tests.fuzz.exchange import Texts, record
from tests.fuzz.server import Keeper
from tests.serving.server import Server


@pytest.fixture(scope="package")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    """What starts the server and ends it."""
    with Keeper(tmp_path_factory.mktemp("fuzz")) as keeper:
        yield keeper


@pytest.fixture
def server(keeper: Keeper) -> Server:
    """A server that lives, whatever the test before this one did."""
    return keeper.server()


@pytest.fixture(scope="package")
def expected(keeper: Keeper) -> list[Texts]:
    """The answers of the well-behaved requests, each alone on a new server."""
    return record(keeper.server())
