# SPDX-License-Identifier: Apache-2.0
"""The Ray examples run as they stand."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from ray import serve

from tests.ports import free_port
from vllm_nbdiff.adapt import problems

EXAMPLES = Path(__file__).parents[2] / "examples"
PYTHON = sys.executable


def test_ray_data_batch(ray_environment: dict[str, str]) -> None:
    """Every problem is answered, most of them right."""
    run = subprocess.run(
        [PYTHON, str(EXAMPLES / "ray_data_batch.py")],
        env=ray_environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    asked = problems.held_out(32)
    right = [f"{it.prompt} -> {it.answer.splitlines()[-1]}" for it in asked]
    lines = run.stdout.splitlines()
    assert sum(" -> " in line for line in lines) == len(asked)
    assert sum(line in lines for line in right) >= 24


def test_ray_serve_and_its_client(ray_environment: dict[str, str], tmp_path: Path) -> None:
    """The deployment answers the client example, whole and in pieces alike."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    log = tmp_path / "log"
    command = [PYTHON, str(EXAMPLES / "ray_serve.py"), "--port", str(port)]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            env=ray_environment,
            stdout=output,
            stderr=output,
            # Where the tests run in the background of a shell, SIGINT is ignored, and is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        deadline = time.monotonic() + 1800  # the whole test took 752 s on two busy cores
        while not is_running():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        run = subprocess.run(
            [PYTHON, str(EXAMPLES / "openai_client.py"), url],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        server.send_signal(signal.SIGINT)
        server.wait(400)  # replicas end gracefully, slowly on a busy machine
    finally:
        server.kill()
    assert run.returncode == 0, run.stderr
    lines = run.stdout.replace("|", "").splitlines()
    assert lines[:2] == lines[2:] and lines[1].startswith("Answer: ")


def is_running() -> bool:
    """Whether every deployment is up; the ingress answers `/models` long before the engine."""
    application = serve.status().applications.get("default")
    return application is not None and application.status == "RUNNING"
