"""Ports for servers that die and come back, or that are opened later."""

import random
import socket

FIRST, LAST = 15_000, 30_000
"""Below the range from which the kernel takes ports for others (32768 and up by default)."""
TRIES_MAX = 100


def lasting_port() -> int:
    """Return a port of loopback that nobody gets by accident while nothing listens on it."""
    for _ in range(TRIES_MAX):
        port = random.SystemRandom().randrange(FIRST, LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no free port in {FIRST}..{LAST}")
