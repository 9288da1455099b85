# SPDX-License-Identifier: Apache-2.0
"""One server for all tests of this folder, and an engine that answers the same offline."""

from typing import Any

import openai
import pytest

from tests.conftest import in_process
from tests.serving.keeper import Keeper
from tests.serving.server import ENGINE, MODEL, Server


@pytest.fixture(scope="module")
def server(keeper: Keeper) -> Server:
    """A running server."""
    return keeper.server()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """A client of it."""
    return server.client()


@pytest.fixture(scope="package")
def offline() -> Any:
    """An engine of the same settings in this process."""
    from vllm import LLM

    with in_process():
        return LLM(model=str(MODEL), enforce_eager=True, **ENGINE)
