# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process on a free loopback port."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.ports import free_port

MODEL = Path(__file__).parents[2] / "examples" / "nbdiff-nano"
NAME = "nano"
# Of the server and of its offline twin.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "kv_cache_memory_bytes": 256 << 20,
}
START_LIMIT = 400  # seconds, on a machine that is busy with something else
STOP_LIMIT = 60


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str

    def client(self) -> openai.OpenAI:
        """A client that does not hide failures behind retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def async_client(self) -> openai.AsyncOpenAI:
        """The same for many requests at a time."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300
        )

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the samples of one metric that carry the labels; KeyError when there is none."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        values = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not values:
            raise KeyError(name)
        return sum(values)

    def family(self) -> list[psutil.Process]:
        """The server's process and all its descendants."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self) -> list[psutil.Process]:
        """Send SIGTERM and wait; kill and return what is left after the limit."""
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT)
        _, left = psutil.wait_procs(family[1:], timeout=5)
        if self.process.poll() is None:
            left.append(family[0])
        for process in left:
            process.kill()
        return left


@contextlib.contextmanager
def serve(
    log: Path, *flags: str, model: Path = MODEL, worker_apart: bool = False
) -> Iterator[Server]:
    """Start a server, ready to answer, and end it on the way out.

    vLLM's worker has a process of its own by default, which takes as long to start as the others.
    """
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *(f"--{key.replace('_', '-')}={value}" for key, value in ENGINE.items()),
        *flags,
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(worker_apart))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    server = Server(process, f"http://127.0.0.1:{port}")
    try:
        _wait_until_healthy(server, log)
        yield server
    finally:
        if process.poll() is None:
            server.stop()


def _wait_until_healthy(server: Server, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended while starting:\n{log.read_text()[-4000:]}")
        health = f"{server.url}/health"
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):
            return
        time.sleep(0.5)
    raise TimeoutError(f"the server did not start in {START_LIMIT} s:\n{log.read_text()[-4000:]}")
