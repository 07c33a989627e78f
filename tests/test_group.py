"""Machines of a group start together, refuse strangers, and end together. Real processes and sockets, no vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
from ports import free_pair

from lda_service.config import Config, PairConfig, VllmConfig
from lda_service.errors import ConfigError

MACHINE = """
import sys, time
from lda_service.config import VllmConfig
from lda_service.errors import LdaError
from lda_service.vllm_engine import group
rank, nnodes, port, digest = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
settings = VllmConfig(tensor_parallel_size=nnodes, nnodes=nnodes, node_rank=rank, master_port=port)
try:
    (group.follow if rank else group.lead)(settings, digest)
except LdaError as error:
    print(error.message, flush=True)
    sys.exit(2)
print("go", flush=True)
time.sleep(60)
"""
WAIT_S = 30


@pytest.fixture
def machine():
    """Starts machines; ends what is left of them."""
    started = []

    def start(rank, nnodes, port, digest="same"):
        arguments = [sys.executable, "-c", MACHINE, str(rank), str(nnodes), str(port), digest]
        started.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_starts_when_all_are_there(machine):
    """Followers may come first; nobody starts before the last machine is there, then all do."""
    port = free_pair()
    group = [machine(rank, 3, port) for rank in (2, 0)]
    assert all(process.poll() is None for process in group)
    group.append(machine(1, 3, port))
    assert [process.stdout.readline().strip() for process in group] == ["go"] * 3


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_ends_together(machine, victim):
    """Whichever machine is killed, all others end within a second, with a code that asks for a fresh start."""
    port = free_pair()
    group = [machine(rank, 3, port) for rank in range(3)]
    for process in group:
        assert process.stdout.readline().strip() == "go"
    group[victim].send_signal(signal.SIGKILL)
    ends = [process.wait(1.0) for process in group]
    assert ends == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]


def test_refuses_another_pair(machine):
    """A machine with other models or settings is told so and ends; the group still waits for the right one."""
    port = free_pair()
    leader, stranger = machine(0, 2, port), machine(1, 2, port, "other")
    assert stranger.wait(WAIT_S) == 2
    assert "models or settings are others" in stranger.stdout.readline()
    assert machine(1, 2, port).stdout.readline().strip() == "go"
    assert leader.stdout.readline().strip() == "go"


def test_survives_garbage(machine):
    """What connects and sends no greeting is dropped, and costs nobody else anything."""
    port = free_pair()
    leader = machine(0, 2, port)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b'{"node_rank": "x"}\n', b'{"node_rank": 7}\n', b""):
        connection = connect(port + 1)
        connection.sendall(garbage)
        with suppress(OSError):  # it may be dropped by now
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1024):
                pass
        connection.close()
    follower = machine(1, 2, port)
    assert [process.stdout.readline().strip() for process in (leader, follower)] == ["go", "go"]


def connect(port):
    """A connection to a machine that is starting."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        except ConnectionRefusedError:
            os.sched_yield()


def test_address_of_another_machine(machine):
    """A leader whose address is not its own says which settings to look at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        leader = machine(0, 2, taken.getsockname()[1] - 1)
        assert leader.wait(WAIT_S) == 2
    assert "MASTER_ADDR" in leader.stdout.readline()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"nnodes": 2, "node_rank": 2, "tensor_parallel_size": 2}, "NODE_RANK"),
        ({"nnodes": 2, "tensor_parallel_size": 3}, "NNODES"),
    ],
)
def test_impossible_groups(settings, named):
    """Machines that cannot share ranks evenly, or are not of the group, are named before anything starts."""
    with pytest.raises(ConfigError, match=named):
        VllmConfig(**settings)


def test_native_engine_has_no_group():
    """Settings of the vLLM backend are refused on the native engine, not ignored."""
    with pytest.raises(ConfigError, match="--backend vllm"):
        Config(PairConfig("a", "b"), vllm=VllmConfig(tensor_parallel_size=2))
