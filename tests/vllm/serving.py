"""Real `lda-service serve` processes for the tests of the vLLM backend: their output, their children, their health."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

SCRIPT = Path(sys.executable).parent / "lda-service"
SERVICE = "lda.v1.LdaService"
START_S, STOP_S = 480.0, 60.0
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Process:
    """`lda-service serve` with these flags; its output is read as it comes, so that no pipe fills up."""

    def __init__(self, *flags, **environment):
        self.lines: list[str | None] = []  # None: it ended
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [str(part) for part in (SCRIPT, "serve", "--port", 0, *flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self._add(line)
        self._add(None)

    def _add(self, line):
        with self._news:
            self.lines.append(line)
            self._news.notify_all()

    def told(self, pattern, timeout_s=START_S):
        """The first line that matches, once it is there."""
        until, seen = time.monotonic() + timeout_s, 0
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    assert line is not None, f"ended before {pattern!r}:\n{self.text}"
                    if match := re.search(pattern, line):
                        return match
                seen = len(self.lines)
                assert self._news.wait(until - time.monotonic()), f"no {pattern!r} in time:\n{self.text}"

    def ready(self):
        """Wait until it serves; the target."""
        target = self.told(r"^listening on (\S+)")[1]
        self.told(r"^ready: ")
        return target

    @property
    def text(self):
        """All it said."""
        return "".join(line for line in self.lines if line is not None)

    @property
    def descendants(self):
        """All processes below it."""
        if self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def ranks(self):
        """Process ids of the ranks that are processes of their own."""
        return [child.pid for child in self.descendants if "VLLM" in _title(child)]

    def end(self, number=signal.SIGTERM):
        """Ask it to stop; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def _title(process):
    """What it calls itself; nothing if it has just ended."""
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return ""


class Health:
    """The health of a server as it changes."""

    def __init__(self, target):
        self._channel = grpc.insecure_channel(target)
        self._changes = health_pb2_grpc.HealthStub(self._channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=START_S
        )

    def until(self, status):
        """Wait until it has this status; when that was."""
        for change in self._changes:
            if change.status == status:
                return time.monotonic()
        raise AssertionError("the watch ended")

    def close(self):
        self._channel.close()
