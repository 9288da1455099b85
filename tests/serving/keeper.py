# SPDX-License-Identifier: Apache-2.0
"""A server that is started again when something has killed it."""

from __future__ import annotations

import contextlib
import urllib.request
from pathlib import Path
from types import TracebackType

from tests.serving.server import Server, serve

LOG_LINES = 80  # of a report: a traceback of the worker and what follows it


class Keeper:
    """Keeps one server alive; on the way out ends it."""

    def __init__(self, logs: Path) -> None:
        """`logs`: an existing folder for the log of each start."""
        self.logs = logs
        self.starts = 0
        self._running: Server | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def log(self) -> Path:
        """The log of the last start."""
        return self.logs / f"server-{self.starts}.log"

    def report(self, wrong: list[str]) -> str:
        """What went wrong, with the end of the log."""
        end = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n\n".join([*wrong, "\n".join(end)])

    def server(self) -> Server:
        """The server that runs, or else a new one."""
        if self._running is None or not is_healthy(self._running):
            self._stack.close()
            self.starts += 1
            self._running = self._stack.enter_context(serve(self.log, worker_apart=True))
        return self._running


def is_healthy(server: Server) -> bool:
    """Whether the front end and the engine behind it live."""
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=30) as response:
            return response.status == 200
    except OSError:  # urllib's errors of HTTP are OSErrors as well
        return False
