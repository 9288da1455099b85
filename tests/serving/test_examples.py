# SPDX-License-Identifier: Apache-2.0
"""The examples that need no Ray run as they stand."""

import json
import subprocess
import sys
from pathlib import Path

from tests.serving.server import Server

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*command: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_openai_client(server: Server) -> None:
    """The whole answer in two lines, then the same in pieces."""
    output = run(sys.executable, str(EXAMPLES / "openai_client.py"), f"{server.url}/v1")
    assert output.count("|") > 2
    lines = output.replace("|", "").splitlines()
    assert lines[:2] == lines[2:] and lines[1].startswith("Answer: ")


def test_curl(server: Server) -> None:
    """A completion, then a stream."""
    whole, *events = run("sh", str(EXAMPLES / "serve_curl.sh"), f"{server.url}/v1").splitlines()
    text = json.loads(whole)["choices"][0]["text"]
    data = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    pieces = "".join(part["choices"][0]["delta"].get("content") or "" for part in data)
    assert "Answer: " in text and pieces == text
    assert "data: [DONE]" in events


def test_offline_batch() -> None:
    """Two conversations and three requests with options of their own."""
    output = run(sys.executable, str(EXAMPLES / "offline_batch.py"))
    assert output.count("Answer: ") == 5
