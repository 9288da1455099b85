# SPDX-License-Identifier: Apache-2.0
"""SIGTERM while requests run."""

from __future__ import annotations

import threading
import time

import openai

from tests.serving.server import NAME, STOP_LIMIT, Server

CLIENTS = 8


def ask(server: Server, ended: list[str]) -> None:
    """A long request; notes how it ended."""
    one_a_step = {"nbdiff_threshold": 1.0, "nbdiff_small_blocks": 1}
    try:
        response = server.client().completions.create(
            model=NAME,
            prompt="What is 3 + 4?",
            max_tokens=480,
            extra_body={"ignore_eos": True, "vllm_xargs": one_a_step},
        )
        ended.append(response.choices[0].finish_reason)
    except openai.APIError as error:
        ended.append(type(error).__name__)


def test_sigterm_in_the_middle(server: Server) -> None:
    """The server ends in time, leaves no process behind, and no client waits for ever."""
    ended: list[str] = []
    threads = [threading.Thread(target=ask, args=(server, ended)) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") < CLIENTS:
        assert time.monotonic() < deadline, f"requests did not run, {ended}"
        time.sleep(0.1)
    assert len(server.family()) >= 3  # front end, engine, worker
    begin = time.monotonic()
    left = server.stop()
    took = time.monotonic() - begin
    for thread in threads:
        thread.join(timeout=30)
    assert left == []
    assert server.process.returncode == 0
    assert took < STOP_LIMIT
    assert ended == ["abort"] * CLIENTS
