"""One pair over two machines, as two processes on one host, by the commands that an operator runs."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest
from lda_client import LdaClient, WorkerDied
from ports import free_pair
from serving import NOT_SERVING, SERVING, Health, Process

QUESTIONS = ("Which tea do you like?", "What is 2 plus 3?")
ALPHAS = (-0.5, 0.0, 1.0, 3.0)
WITHIN_S = 1.0  # `pytest -s` shows how long it was


class Group:
    """Two machines, of which the first serves. The second is started first: either order is right."""

    def __init__(self, *flags):
        flags = (*flags, "--backend", "vllm", "--nnodes", 2, "--master-port", free_pair())
        self.follower = Process(*flags, "--node-rank", 1)
        self.leader = Process(*flags, "--node-rank", 0)

    def end(self):
        """Stop both; their exit codes, and which of their processes are left."""
        below = [process for machine in (self.leader, self.follower) for process in machine.descendants]
        codes = [self.leader.end(), self.follower.end()]
        return codes, psutil.wait_procs(below, timeout=10)[1]


def texts(target):
    """Greedy and sampled texts at several alphas."""
    with LdaClient(target) as client:
        return {
            (question, alpha, temperature): [
                sequence.text
                for sequence in client.complete(
                    question,
                    alpha=alpha,
                    temperature=temperature,
                    seed=7,
                    num_sequences=2 if temperature else 1,
                    max_new_tokens=12,
                )
            ]
            for question in QUESTIONS
            for alpha in ALPHAS
            for temperature in (0.0, 0.8)
        }


@pytest.fixture(scope="module")
def expected():
    """What the native engine draws."""
    server = Process()
    try:
        yield texts(server.ready())
    finally:
        server.end()


@pytest.fixture(scope="module")
def group():
    """Two machines with a rank each that share every layer."""
    group = Group("--tensor-parallel-size", 2)
    try:
        yield group
    finally:
        group.end()


def test_tensor_parallel_over_two_machines(group, expected):
    """Two machines that share every layer draw the native engine's texts, seed for seed."""
    assert texts(group.leader.ready()) == expected


class Reader(threading.Thread):
    """Reads a stream to its end, and says when the first token is there and how it ended."""

    def __init__(self, client, seed):
        super().__init__()
        self.began, self.error, self.ended_at = threading.Event(), None, 0.0
        self._stream = client.generate(QUESTIONS[0], alpha=1.0, max_new_tokens=450, ignore_eos=True, seed=seed)

    def run(self):
        try:
            for event in self._stream:
                if event.HasField("delta"):
                    self.began.set()
        except WorkerDied as error:
            self.error = error
        self.ended_at = time.monotonic()
        self.began.set()


@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_a_rank_is_killed(group, is_busy):
    """Kill -9 of a rank on the machine that does not serve, at work or idle: streams end UNAVAILABLE and health turns
    within a second; then the group is back by itself.
    """
    target = group.leader.ready()
    health = Health(target)
    health.until(SERVING)
    with LdaClient(target) as client:
        readers = [Reader(client, seed) for seed in range(4 if is_busy else 0)]
        for reader in readers:
            reader.start()
        for reader in readers:
            assert reader.began.wait(60)
        killed_at = time.monotonic()
        os.kill(group.follower.ranks[0], signal.SIGKILL)
        took_s = health.until(NOT_SERVING) - killed_at
        for reader in readers:
            reader.join()
            assert reader.error is not None, "a stream ended as if nothing had happened"
            took_s = max(took_s, reader.ended_at - killed_at)
        assert took_s < WITHIN_S
        back_s = health.until(SERVING) - killed_at
        health.close()
        print(f"rank killed: {len(readers)} streams and health told in {took_s * 1000:.0f} ms, back in {back_s:.0f} s")
        assert client.complete(QUESTIONS[0], max_new_tokens=4)


def test_stops_and_leaves_nothing(group):
    """SIGTERM ends both machines with code 0, and no process of theirs is left."""
    group.leader.ready()
    codes, left = group.end()
    assert codes == [0, 0]
    assert not left


def test_pipeline_parallel_over_two_machines(expected):
    """Two machines that share the layers draw the native engine's texts, seed for seed."""
    group = Group("--pipeline-parallel-size", 2)
    try:
        assert texts(group.leader.ready()) == expected
    finally:
        group.end()
