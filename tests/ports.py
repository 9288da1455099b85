# SPDX-License-Identifier: Apache-2.0
"""Ports for the servers that tests start."""

import random
import socket

# Below what Linux hands out to port 0 and to clients, above the workers of Ray: a server binds long
# after its port was chosen, and nothing that starts meanwhile may be given the same one.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing uses and nothing is going to be given by chance."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port of 100 tried from {PORTS.start} to {PORTS.stop - 1}")
