"""The servers that cases name: started as processes on free loopback ports, brought into the state a case asks for.

    echo, small, one_caller, loading, tls, secure
                        the real server over the fake engine of the tests (echo_server.py)
    disposable, draining
                        the same, a fresh process for each case, since the case ends it
    scripted            plays the script of the case (script_server.py)
    pair                `lda-service serve` on the bundled pair, or the command that the runner is given
    stuck               a port that takes connections and never says a word
    nobody              a port at which nobody listens

Knows processes and the load of servers; nothing of clients and of what they should answer.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from lda_client.gen.lda.v1 import admin_service_pb2 as admin_pb
from lda_client.gen.lda.v1 import admin_service_pb2_grpc, lda_service_pb2_grpc
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cases import Case

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SERVE = (str(Path(sys.executable).with_name("lda-service")), "serve")
PAIR_FLAGS = ("--port", "0", "--drain-grace", "1")
START_S, SETTLE_S = 180.0, 20.0
SHARED = ("echo", "small", "one_caller", "loading", "tls", "secure")
OBSERVED = ("echo", "small", "one_caller", "pair")  # whose load is looked at before each case: they are open to anybody
FRESH = ("disposable", "draining")
NAMES = (*SHARED, *FRESH, "scripted", "pair", "stuck", "nobody")
# Token, scopes and expiry of the servers `tls` and `secure`.
TOKENS = (
    ("t-all", "generate,score", ""),
    ("t-score", "score", ""),
    ("t-expired", "generate,score", "2020-01-01"),
)


class ServerFailed(Exception):
    """A server did not start, or did not come into the state that a case needs."""


class Process:
    """A server in a process of its own; what it prints on standard error goes into a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command, self._log = command, log
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{HERE}"}
        with log.open("wb") as errors:
            self.popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=ROOT
            )

    def line(self, holds: Callable[[str], object] = bool) -> str:
        """The first line on standard output of which this is true. Raises ServerFailed."""
        until, printed = time.monotonic() + START_S, b""
        output = self.popen.stdout
        assert output is not None
        while select.select([output], [], [], max(0.0, until - time.monotonic()))[0]:
            chunk = os.read(output.fileno(), 65536)
            if not chunk:
                break
            printed += chunk
            for line in printed.decode().splitlines(keepends=True):
                if line.endswith("\n") and holds(line.strip()):
                    return line.strip()
        raise ServerFailed(
            f"{' '.join(self._command)} did not start; {printed.decode()!r}\n{self._log.read_text()[-2000:]}"
        )

    def terminate(self) -> None:
        """SIGTERM: the server drains."""
        self.popen.terminate()

    def kill(self) -> None:
        """End it at once, and with it the worker that it owns."""
        self.popen.kill()
        self.popen.communicate()


class Watcher:
    """The runner's own eyes on a server, and its own requests there."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.lda = lda_service_pb2_grpc.LdaServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)

    def load(self) -> pb.GetLoadResponse:
        """How busy the server is."""
        return self.lda.GetLoad(pb.GetLoadRequest(), timeout=SETTLE_S)

    def wait(self, holds: Callable[[pb.GetLoadResponse], object], what: str, timeout_s: float | None = None) -> None:
        """Until the load is so. Raises ServerFailed."""
        timeout_s = SETTLE_S if timeout_s is None else timeout_s
        until = time.monotonic() + timeout_s
        while not holds(load := self.load()):
            if time.monotonic() > until:
                raise ServerFailed(f"the server is not {what} after {timeout_s:g} s: {load}".replace("\n", " "))
            time.sleep(0.01)

    def wait_free(self) -> None:
        """Until nothing is open and work is taken. Raises ServerFailed."""
        self.wait(lambda load: load.accepts_work and not load.open_requests, "free")

    def wait_running(self, requests: int) -> None:
        """Until as many requests are open and none waits. Raises ServerFailed."""
        self.wait(lambda load: load.open_requests == requests and not load.waiting_requests, "at work")

    def generate(self, text: str, tokens: int = 4096) -> Any:
        """A request of our own, under way."""
        stopping = pb.Stopping(max_new_tokens=tokens)
        return self.lda.GenerateLDA(pb.GenerateLDARequest(prompt=pb.Prompt(text=text), stopping=stopping))

    def abort_all(self) -> None:
        """End every generation, as an operator does."""
        for open_ in self.admin.ListGenerations(admin_pb.ListGenerationsRequest(), timeout=SETTLE_S).generations:
            self.admin.AbortGeneration(admin_pb.AbortGenerationRequest(generation_id=open_.generation_id))


class Servers:
    """All servers of a run, as a context manager; only those that the cases name are started.

    Args:
        names: of the servers.
        serve: the command that serves the bundled pair.
    """

    def __init__(self, names: set[str], serve: Sequence[str] = SERVE) -> None:
        self._names, self._serve = names, serve
        self._stack = ExitStack()
        self._ports: dict[str, int] = {}
        self._watchers: dict[str, Watcher] = {}

    def __enter__(self) -> Servers:
        with self._stack as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lda-conformance-")))
            prepare_access(self.folder)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        pair = self._spawn("pair", [*self._serve, *PAIR_FLAGS]) if "pair" in self._names else None
        if shared := [name for name in SHARED if name in self._names]:
            self._ports |= json.loads(self._spawn_echo("shared", *shared).line())
        if "scripted" in self._names:
            program = [sys.executable, str(HERE / "script_server.py")]
            self._ports |= json.loads(self._spawn("scripted", program).line())
        for name, listens in (("stuck", True), ("nobody", False)):
            self._ports[name] = self._stack.enter_context(silent_port(listens))
        if pair is not None:
            self._ports["pair"] = int(pair.line(lambda line: line.startswith("listening")).rpartition(":")[2])
        self._watchers = {name: Watcher(self._ports[name]) for name in OBSERVED if name in self._ports}
        if pair is not None:
            self._watchers["pair"].wait(lambda load: load.accepts_work, "ready", START_S)

    def _spawn(self, name: str, command: list[str]) -> Process:
        process = Process(command, self.folder / f"{name}.log")
        self._stack.callback(process.kill)
        return process

    def _spawn_echo(self, log: str, *names: str) -> Process:
        return self._spawn(log, [sys.executable, str(HERE / "echo_server.py"), str(self.folder), *names])

    def target(self, name: str) -> str:
        """The address of a server that is shared by all cases."""
        return f"127.0.0.1:{self._ports[name]}"

    @contextmanager
    def prepared(self, case: Case) -> Iterator[Stage]:
        """A stage in the state that the case asks for. Raises ServerFailed."""
        with ExitStack() as stack:
            process, port, watcher = None, self._ports.get(case.server, 0), self._watchers.get(case.server)
            if case.server in FRESH:
                process = self._spawn_echo(case.server, case.server)
                stack.callback(process.kill)
                port = json.loads(process.line())[case.server]
                watcher = Watcher(port)
                stack.callback(watcher.channel.close)
            if watcher is not None:
                watcher.wait_free()
            stage = Stage(f"127.0.0.1:{port}", process, watcher, stack)
            stage.before(case.before)
            yield stage


class Stage:
    """One server, ready for one case."""

    def __init__(self, target: str, process: Process | None, watcher: Watcher | None, stack: ExitStack) -> None:
        self.target = target
        self._process, self._watcher, self._stack = process, watcher, stack

    def before(self, state: str | None) -> None:
        """Bring the server into a state with requests of our own. Raises ServerFailed."""
        if state == "crowded":  # the server has seen how fast requests end, and three wait or run
            for _ in self.watcher.generate("clock", tokens=24):
                pass
        if state is not None:
            self._hold(3 if state == "crowded" else 1)
        if state == "draining":
            self._drain()
            self.watcher.wait(lambda load: not load.accepts_work, "draining")

    def during(self, action: str | None) -> None:
        """Do something to the server once the adapter's request runs there. Raises ServerFailed."""
        if action is None:
            return
        self.watcher.wait_running(1)
        for _ in self.watcher.generate("hi", tokens=3):  # meanwhile `started` has left the server
            pass
        {"drain": self._drain, "kill": self._kill, "abort": self.watcher.abort_all}[action]()

    def left_open(self) -> list[str]:
        """What the adapter left open on the server, in words; ended here, so that it disturbs no other case."""
        try:
            self.watcher.wait_free()
        except ServerFailed as error:
            self.watcher.abort_all()
            return [f"the call was not cancelled on the server: {error}"]
        return []

    @property
    def watcher(self) -> Watcher:
        """Our eyes on this server. Raises ServerFailed if it has none."""
        if self._watcher is None:
            raise ServerFailed("the load of this server is not observed: use another one for this case")
        return self._watcher

    def _hold(self, requests: int) -> None:
        for _ in range(requests):
            self._stack.callback(self.watcher.generate("hold").cancel)
        self.watcher.wait(lambda load: load.open_requests == requests, "occupied")

    def _drain(self) -> None:
        assert self._process is not None, "only a server of its own can be drained"
        self._process.terminate()

    def _kill(self) -> None:
        assert self._process is not None, "only a server of its own can be killed"
        self._process.kill()


@contextmanager
def silent_port(listens: bool) -> Iterator[int]:
    """A port that takes connections and never answers, or one that refuses them."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        if listens:
            held.listen(128)
        yield held.getsockname()[1]


def prepare_access(folder: Path) -> None:
    """Write certificates, keys and the file of tokens: ca.pem, other-ca.pem, server.*, client.*, stranger.*, tokens."""
    ours, others = Authority(folder, "ca"), Authority(folder, "other-ca")
    ours.issue("server", dns=["localhost"], ips=["127.0.0.1"])
    ours.issue("client", uris=["spiffe://cluster.local/ns/lda/sa/caller"])
    others.issue("stranger")
    lines = [f"{name} {sha256(name.encode()).hexdigest()} {scopes} {expires}\n" for name, scopes, expires in TOKENS]
    (folder / "tokens").write_text("".join(lines))
