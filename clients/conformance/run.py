"""Run every client through the same cases, and its samples, and print the matrix.

    python clients/conformance/run.py                      every client of clients.yaml
    python clients/conformance/run.py --client go --case half_characters --build
    python clients/conformance/run.py --server pair --serve ".bench/vllm/bin/lda-service serve --backend vllm"

Exit status 1 if anything failed. A client whose tools are missing is skipped, and fails with --no-skip or CI=true.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import cases
from adapters import Adapter, AdapterFailed, Client, registry
from grpc import RpcError
from servers import NAMES, SERVE, ServerFailed, Servers

if TYPE_CHECKING:
    from collections.abc import Iterable

ANSWER_S, SAMPLE_S, TESTS_S, BUILD_S = 30.0, 120.0, 600.0, 1200.0
PASSED, FAILED, SKIPPED = "ok", "FAILED", "-"


@dataclass(frozen=True)
class Outcome:
    """What became of one row for one client."""

    client: str
    row: str
    findings: tuple[str, ...] = ()
    skipped: bool = False
    seconds: float = 0.0

    @property
    def mark(self) -> str:
        """The word in the matrix."""
        return SKIPPED if self.skipped else FAILED if self.findings else PASSED


def call_of(case: cases.Case, client: str, target: str, folder: Path) -> dict[str, Any]:
    """The line that the adapter gets."""
    call = {"id": case.name, "target": target, "request": {}, **case.call}
    if case.attempts:
        call["token"] = f"{case.name}.{client}"
    if "tls" in call:
        call["tls"] = {name: str(folder / file) for name, file in call["tls"].items()}
    return call


def run_case(case: cases.Case, client: str, adapter: Adapter, servers: Servers) -> Outcome:
    """One case with one client."""
    begun = time.monotonic()
    try:
        with servers.prepared(case) as stage:
            adapter.send(call_of(case, client, stage.target, servers.folder))
            stage.during(case.during)
            answer = adapter.receive(case.name, ANSWER_S + case.call.get("timeoutMs", 0) / 1000)
            found = cases.findings(case, answer)
            found += stage.left_open() if case.expect.get("freed") else []
    except AdapterFailed as error:
        found = [str(error)]
    except (ServerFailed, RpcError) as error:
        adapter.restart()
        found = [f"the runner failed: {error}"]
    return Outcome(client, case.name, tuple(found), seconds=time.monotonic() - begun)


def run_cases(chosen: Iterable[cases.Case], client: Client, servers: Servers) -> list[Outcome]:
    """All cases with one client, through one process of its adapter for as long as it lives."""
    with closing(Adapter(client)) as adapter:
        return [run_case(case, client.name, adapter, servers) for case in chosen]


def run_samples(client: Client, target: str) -> list[Outcome]:
    """The samples of one client against the bundled pair; the last line must be `ok`."""
    samples = client.samples.items()
    return [run_command(client, f"sample {name}", each, SAMPLE_S, "ok", LDA_TARGET=target) for name, each in samples]


def run_tests(client: Client) -> list[Outcome]:
    """What a client checks by itself: its own tests, style, fresh generated code."""
    tools = {"BUF": str(Path(sys.executable).with_name("buf")), "LDA_PYTHON": sys.executable}
    return [run_command(client, f"own {name}", each, TESTS_S, **tools) for name, each in client.tests.items()]


def run_command(
    client: Client, row: str, command: list[str], timeout_s: float, last_line: str | None = None, **environment: str
) -> Outcome:
    """A command that must succeed, and end with this line if one is given."""
    begun = time.monotonic()
    try:
        ended = client.run(command, timeout_s, **environment)
        said = ended.stdout.rstrip().rpartition("\n")[2].strip()
        right = ended.returncode == 0 and last_line in (None, said)
        found = () if right else (f"exit {ended.returncode}, printed: {ended.stdout[-2000:]}",)
    except (OSError, subprocess.TimeoutExpired) as error:
        found = (f"{type(error).__name__}: {error}",)
    return Outcome(client.name, row, found, seconds=time.monotonic() - begun)


def build(client: Client) -> str | None:
    """Run the build command of a client; what went wrong, if anything did."""
    print(f"building {client.name}", flush=True)
    try:
        ended = client.run(client.build, BUILD_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the build failed: {error}"
    return f"the build failed: {ended.stdout[-2000:]}" if ended.returncode else None


def run_client(
    client: Client, chosen: list[cases.Case], servers: Servers, options: argparse.Namespace
) -> list[Outcome]:
    """Everything for one client."""
    rows = [case.name for case in chosen]
    if missing := client.missing_tools():
        reason = f"not on the PATH: {', '.join(missing)}"
        return [Outcome(client.name, row, (reason,), skipped=not options.no_skip) for row in rows]
    if options.build and client.build and (failure := build(client)):
        return [Outcome(client.name, row, (failure,)) for row in rows]
    outcomes = run_cases(chosen, client, servers)
    if options.case is None:
        outcomes += run_samples(client, servers.target("pair"))
    if options.build and options.case is None:
        outcomes += run_tests(client)
    return outcomes


def print_matrix(outcomes: list[Outcome]) -> None:
    """Rows are cases, columns are clients; then what was found, and the counts."""
    clients = list(dict.fromkeys(outcome.client for outcome in outcomes))
    marks = {(outcome.row, outcome.client): outcome.mark for outcome in outcomes}
    rows = list(dict.fromkeys(outcome.row for outcome in outcomes))
    wide, columns = max(map(len, rows)), [max(len(client), len(FAILED)) for client in clients]
    print(" " * wide, *(f"{client:<{width}}" for client, width in zip(clients, columns, strict=True)), sep="  ")
    for row in rows:
        cells = (f"{marks.get((row, client), ''):<{width}}" for client, width in zip(clients, columns, strict=True))
        print(f"{row:<{wide}}", *cells, sep="  ")
    for (client, findings), failed in failures(outcomes).items():
        print(f"\n{client}: {', '.join(failed)}", *findings, sep="\n  ")
    print()
    for client in clients:
        print(summary(client, [outcome for outcome in outcomes if outcome.client == client]))


def failures(outcomes: list[Outcome]) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """The rows that failed by client and what was found: an adapter that died says so once."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for outcome in outcomes:
        if outcome.mark == FAILED:
            found.setdefault((outcome.client, outcome.findings), []).append(outcome.row)
    return found


def summary(client: str, outcomes: list[Outcome]) -> str:
    """One line of counts; a client that was left out says why."""
    if all(outcome.skipped for outcome in outcomes):
        return f"{client}: SKIPPED, {outcomes[0].findings[0]}"
    counts = Counter(outcome.mark for outcome in outcomes)
    return f"{client}: {counts[PASSED]} passed, {counts[FAILED]} failed, {sum(each.seconds for each in outcomes):.0f} s"


def write_junit(outcomes: list[Outcome], path: Path) -> None:
    """The same as XML of JUnit: a suite for each client."""
    root = ElementTree.Element("testsuites")
    for client in dict.fromkeys(outcome.client for outcome in outcomes):
        suite = ElementTree.SubElement(root, "testsuite", name=client)
        for outcome in (each for each in outcomes if each.client == client):
            attributes = {"classname": client, "name": outcome.row, "time": f"{outcome.seconds:.3f}"}
            element = ElementTree.SubElement(suite, "testcase", attributes)
            if outcome.findings:
                kind = "skipped" if outcome.skipped else "failure"
                ElementTree.SubElement(element, kind, message="\n".join(outcome.findings))
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", action="append", help="this client only; may be given again")
    parser.add_argument("--case", action="append", help="this case only, and no samples; may be given again")
    parser.add_argument("--server", action="append", choices=NAMES, help="its cases only; may be given again")
    parser.add_argument("--serve", type=shlex.split, default=SERVE, help="what serves the bundled pair, with its flags")
    parser.add_argument("--build", action="store_true", help="build each client first, and run its own tests last")
    parser.add_argument("--junit", type=Path, help="write the outcomes here too")
    no_skip = os.environ.get("CI") == "true"
    parser.add_argument("--no-skip", action="store_true", default=no_skip, help="a missing tool is a failure")
    return parser.parse_args(arguments)


def named(items: list[Any], names: list[str] | None) -> list[Any]:
    """Those of these names; all without names. Raises SystemExit for a name that is not there."""
    known = {item.name: item for item in items}
    if unknown := sorted(set(names or ()) - known.keys()):
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in names] if names else items


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse(arguments)
    clients, chosen = named(registry(), options.client), named(cases.load(), options.case)
    chosen = [case for case in chosen if options.server is None or case.server in options.server]
    if not chosen:
        raise SystemExit("no case of these names is for these servers")
    needed = {case.server for case in chosen} | ({"pair"} if options.case is None else set())
    with Servers(needed, options.serve) as servers:
        outcomes = [outcome for client in clients for outcome in run_client(client, chosen, servers, options)]
    print_matrix(outcomes)
    if options.junit:
        write_junit(outcomes, options.junit)
    return int(any(outcome.mark == FAILED for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
