"""Machines that run one pair together: when they may start, and that they end together.

Each follower holds one connection to the leader, beside vLLM's own. It carries a greeting each way and nothing else;
its end says that the group is over. A process that loses a rank of its own machine, or such a connection, ends at once;
whoever supervises it starts a fresh one, which waits for the others again. Knows sockets and process sentinels; nothing
of vLLM.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
from dataclasses import replace
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, NoReturn

from lda_service.errors import ConfigError, StartupError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lda_service.config import Config, VllmConfig
    from lda_service.vllm_engine.pair import PairFacts

logger = logging.getLogger(__name__)
RETRY_S = 0.25
GREETING_BYTES_MAX = 4096
GREETING_TIMEOUT_S = 10.0
NAME_TIMEOUT_S = 60.0
# A machine that vanishes without a word is missed after 5 s.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))
WELCOME, GO = "welcome", "go"


def digest(config: Config, facts: PairFacts) -> str:
    """What all machines of a group must have in common."""
    common = (facts.info.fingerprint, config.engine, replace(config.vllm, node_rank=0))
    return hashlib.sha256(repr(common).encode()).hexdigest()[:16]


def end_with_ranks(sentinels: Sequence[int]) -> None:
    """End this process at once when one of its ranks does; the others follow it."""
    if sentinels:
        _end_after("a rank of this machine ended", lambda: wait(sentinels))


def lead(settings: VllmConfig, ours: str) -> None:
    """Wait for every follower. From then on this process ends when one of them does.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    if settings.nnodes == 1:
        return
    found: dict[int, socket.socket] = {}
    with _listen(settings) as server:
        while len(found) < settings.nnodes - 1:
            logger.info("waiting for %d of %d machines", settings.nnodes - 1 - len(found), settings.nnodes)
            connection, address = server.accept()
            rank = _welcome(connection, settings, ours)
            if rank is not None:
                logger.info("machine %d is here, from %s", rank, address[0])
                if rank in found:  # it was here before, and ended
                    found.pop(rank).close()
                found[rank] = connection
    for connection in found.values():
        _send(connection, GO)
    _end_after("a machine of the group is gone", lambda: wait(list(found.values())))


def follow(settings: VllmConfig, ours: str) -> None:
    """Connect to the leader, and wait until it has everybody. From then on this process ends when the leader does.

    Raises:
        ConfigError: the leader runs another pair or other settings.
        StartupError: the leader ended while this one waited.
    """
    connection = _reach(settings)
    _send(connection, json.dumps({"node_rank": settings.node_rank, "digest": ours}))
    answer = _receive(connection)
    if answer not in (WELCOME, None):
        raise ConfigError(f"The leader at {settings.master_addr} refuses this machine: {answer}")
    connection.settimeout(None)
    if answer is None or _receive(connection) != GO:
        raise StartupError("The leader of the group ended before all machines were there; start it again.")
    _end_after("the leader of the group is gone", lambda: wait([connection]))


def _listen(settings: VllmConfig) -> socket.socket:
    address = (settings.master_addr, settings.master_port + 1)
    until = time.monotonic() + NAME_TIMEOUT_S
    while True:
        try:
            return socket.create_server(address)
        except OSError as error:
            if isinstance(error, socket.gaierror) and time.monotonic() < until:
                time.sleep(RETRY_S)  # a cluster may give this machine its name a little later
                continue
            raise ConfigError(
                f"Cannot listen on {address[0]}:{address[1]} for the other machines: {error.strerror}; MASTER_ADDR is "
                "an address of rank 0's machine, MASTER_PORT and the port after it are free there."
            ) from error


def _reach(settings: VllmConfig) -> socket.socket:
    """A connection to the leader, however long it takes to start."""
    address, told = (settings.master_addr, settings.master_port + 1), False
    while True:
        try:
            return _prepared(socket.create_connection(address, timeout=GREETING_TIMEOUT_S))
        except OSError as error:
            if not told:
                logger.info("waiting for the leader at %s:%d (%s)", *address, error)
                told = True
            time.sleep(RETRY_S)


def _welcome(connection: socket.socket, settings: VllmConfig, ours: str) -> int | None:
    """Read a follower's greeting and answer it; its rank, or None if it does not belong here."""
    _prepared(connection).settimeout(GREETING_TIMEOUT_S)
    try:
        greeting = json.loads(_receive(connection) or "null")
        refusal = _refusal(greeting, settings, ours)
        _send(connection, refusal or WELCOME)
        connection.settimeout(None)
    except (OSError, ValueError) as error:
        refusal = f"it did not greet: {error}"
    if refusal is None:
        return int(greeting["node_rank"])
    logger.warning("a machine is refused: %s", refusal)
    connection.close()
    return None


def _refusal(greeting: Any, settings: VllmConfig, ours: str) -> str | None:
    if not isinstance(greeting, dict) or not isinstance(greeting.get("node_rank"), int):
        return "this is no greeting of a follower"
    if not 0 < greeting["node_rank"] < settings.nnodes:
        return f"NODE_RANK {greeting['node_rank']} is not in a group of {settings.nnodes}"
    if greeting.get("digest") != ours:
        return "its models or settings are others; all machines need the same ones, but for NODE_RANK"
    return None


def _prepared(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _send(connection: socket.socket, line: str) -> None:
    connection.sendall(line.encode() + b"\n")


def _receive(connection: socket.socket) -> str | None:
    """One line, or None at the end of the connection."""
    line = b""
    while not line.endswith(b"\n") and len(line) < GREETING_BYTES_MAX:
        byte = connection.recv(1)
        if not byte:
            return None
        line += byte
    return line.decode().strip()


def end(what: str) -> NoReturn:
    """End this process at once, and with it its share of the group."""
    logger.error("%s; this process ends, and a fresh one is started", what)
    os._exit(1)


def _end_after(what: str, happens: Any) -> None:
    def follow_it() -> None:
        happens()
        end(what)

    threading.Thread(target=follow_it, name="follow-group", daemon=True).start()
