# SPDX-License-Identifier: Apache-2.0
"""Many clients that leave in the middle of a stream, beside one that stays."""

from __future__ import annotations

import asyncio
import time

import httpx

from tests.fuzz import exchange
from tests.fuzz.bodies import Call
from tests.serving.server import Server

CLIENTS = 64
SECONDS = 10
SETTLE = 60  # seconds until the engine has dropped what nobody reads

# One position a step, to the end of the context: none ends by itself before its client leaves.
SLOW = exchange.ASK | {
    "stream": True,
    "max_tokens": 384,
    "ignore_eos": True,
    "temperature": 1,
    "vllm_xargs": {"nbdiff_threshold": 1.0, "nbdiff_small_blocks": 1},
}
LEAVES = [Call("/v1/completions", SLOW, leave_after=lines) for lines in (0, 1, 2, 5)]


async def _leave_again_and_again(client: httpx.AsyncClient, index: int, end: float) -> int:
    left = 0
    while time.monotonic() < end:
        answer = await exchange.post(client, LEAVES[(index + left) % len(LEAVES)])
        assert answer.status == 200, answer
        left += 1
    return left


async def _stay(client: httpx.AsyncClient, end: float) -> list[exchange.Answer]:
    answers = []
    while time.monotonic() < end:
        answers.append(await exchange.post(client, exchange.NEIGHBOURS[0]))
    return answers


async def _overload(server: Server) -> tuple[list[int], list[exchange.Answer]]:
    async with exchange.connect(server) as client:
        end = time.monotonic() + SECONDS
        leaving = asyncio.gather(
            *(_leave_again_and_again(client, index, end) for index in range(CLIENTS))
        )
        answers = await _stay(client, end)
        return await leaving, answers


def test_clients_that_leave(server: Server, expected: list[exchange.Texts]) -> None:
    """The one that stays is served throughout, and nothing runs or waits afterwards."""
    left, answers = asyncio.run(_overload(server))
    assert min(left) > 0
    assert {str(exchange.texts(answer)) for answer in answers} == {str(expected[0])}
    deadline = time.monotonic() + SETTLE
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    while any(server.metric(name) > 0 for name in names):
        assert time.monotonic() < deadline, "requests of clients that left still run"
        time.sleep(0.2)
    _, wrong = exchange.send(server, [], expected)
    assert not wrong, "\n\n".join(wrong)
