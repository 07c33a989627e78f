"""Ports for tests of programs that cannot be told to take any."""

from __future__ import annotations

import socket


def free_pair():
    """A port that is free, and whose successor is too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue
