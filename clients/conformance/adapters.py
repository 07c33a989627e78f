"""The clients of the registry, and their adapters: one process each, one line of JSON in, one out.

Knows processes and the line protocol; nothing of servers and of what a right answer is.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never

import yaml

ROOT = Path(__file__).parents[2]
REGISTRY = Path(__file__).with_name("clients.yaml")
STDERR_CHARS_MAX = 2000


class AdapterFailed(Exception):
    """The adapter died, was silent for too long, or printed what is no answer."""


@dataclass(frozen=True)
class Client:
    """One line of the registry. Commands run in `folder`; `{python}` is the interpreter of the runner."""

    name: str
    folder: str
    adapter: list[str]
    tools: list[str] = field(default_factory=list)
    build: list[str] = field(default_factory=list)
    tests: dict[str, list[str]] = field(default_factory=dict)
    samples: dict[str, list[str]] = field(default_factory=dict)

    def missing_tools(self) -> list[str]:
        """The programs it needs that are not on the PATH."""
        return [tool for tool in self.tools if shutil.which(tool) is None]

    def run(self, command: list[str], timeout_s: float, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of its commands to its end, both outputs in `stdout`. Raises OSError and TimeoutExpired."""
        return subprocess.run(
            resolved(command),
            cwd=ROOT / self.folder,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )


def resolved(command: list[str]) -> list[str]:
    """A command with the interpreter in its place."""
    return [sys.executable if word == "{python}" else word for word in command]


def registry(path: Path = REGISTRY) -> list[Client]:
    """Every client there is."""
    return [Client(**raw) for raw in yaml.safe_load(path.read_text())]


class Adapter:
    """A running adapter. Once it has failed, every further call fails with the same words."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._start()

    def _start(self) -> None:
        self._failure: str | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                resolved(self._client.adapter),
                cwd=ROOT / self._client.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                encoding="utf-8",
            )
        except OSError as error:
            self._process, self._failure = None, f"the adapter cannot be started ({error}); build the client first"
            return
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def restart(self) -> None:
        """Begin afresh where an answer may still be on its way; an adapter that has failed stays so."""
        if self._failure is None:
            self.close()
            self._start()

    def send(self, call: dict[str, Any]) -> None:
        """Ask. Raises AdapterFailed."""
        if self._failure or self._process is None:
            raise AdapterFailed(self._failure)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(call) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._fail("the adapter died")

    def receive(self, call_id: str, timeout_s: float) -> dict[str, Any]:
        """The answer to this call. Raises AdapterFailed."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._fail(f"no answer within {timeout_s:g} s")
        if not line:
            self._fail("the adapter died")
        try:
            answer = json.loads(line)
            if answer["id"] != call_id:
                self._fail(f"it answered {answer['id']!r} when asked {call_id!r}")
        except (ValueError, KeyError, TypeError):
            self._fail(f"it printed what is no answer: {line[:200]!r}")
        return dict(answer)

    def _fail(self, what: str) -> Never:
        self.close()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()[-STDERR_CHARS_MAX:]
        self._failure = f"{what}; it said on standard error: {said or 'nothing'}"
        raise AdapterFailed(self._failure)

    def close(self) -> None:
        """End it: by the end of its input, or by force."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
