"""The parent's side of `child`: start engines' processes, ask them, watch that the waiting ones rest.

Knows commands, environments and pipes; nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
VLLM_PYTHON = ROOT / ".bench" / "vllm" / "bin" / "python"
STOP_TIMEOUT_S = 30.0
# The share of a core that all else on the machine, waiting engines included, may take before a figure is doubtful.
DISTURBED = 0.1


class EngineFailed(Exception):
    """An engine could not be started or answered with an error; the message names its log."""


class EngineMissing(Exception):
    """The engine's environment is not there; the message says how to get it."""


def machine_busy_s(stat: Path = Path("/proc/stat")) -> float:
    """Processor time that all cores together have not been idle, what a hypervisor took included; 0 if not told."""
    try:
        user, nice, system, _, _, irq, soft, stolen = map(int, stat.read_text().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")


class Child:
    """One engine's process. It loads at construction and then waits on its stdin."""

    def __init__(self, name: str, settings: dict[str, Any], log: Path) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [*command(name), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment(name),
            )
        self.warm_rows: set[int] = set()
        self.versions: dict[str, str] = self._answer()

    def ask(self, operation: str, **arguments: Any) -> Any:
        """The result of an operation. Raises EngineFailed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def ask_watched(self, operation: str, **arguments: Any) -> tuple[Any, float]:
        """The result, and the share of a core that all else on the machine took meanwhile. Raises EngineFailed."""
        began, others = time.perf_counter(), machine_busy_s() - self.cpu_s()
        result = self.ask(operation, **arguments)
        others = machine_busy_s() - self.cpu_s() - others
        return result, max(0.0, others) / (time.perf_counter() - began)

    def cpu_s(self) -> float:
        """Processor time used so far; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process: it leaves when its stdin ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message = json.loads(line) if line else {"error": "the process ended"}
        if "error" in message:
            self.close()
            raise EngineFailed(f"{self.name}: {message['error']} (log: {self.log})")
        return message["result"]


def command(name: str) -> Sequence[str]:
    """What starts an engine.

    Raises:
        EngineMissing: its environment was not prepared.
    """
    python = VLLM_PYTHON if name == "vllm" else Path(sys.executable)
    if not python.exists():
        raise EngineMissing(f"{name} is not installed; prepare it with: make bench-peers")
    module = "benchmarks.machine" if name == "machine" else f"benchmarks.engines.{name}"
    return [str(python), "-m", module]


def environment(name: str) -> dict[str, str]:
    """The caller's, without what would make an engine reach for the network or write where it should not.

    The number of threads is each engine's own choice; `OMP_NUM_THREADS`, if set, holds for all.
    """
    ours = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    if name == "ours":
        ours["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "3000")  # as the worker has it
    if name == "vllm":
        # Its own packages only. Without the variable it would take one thread less than there are cores.
        ours = {
            "PYTHONPATH": str(ROOT),
            "VLLM_CACHE_ROOT": str(ROOT / ".bench" / "cache"),
            # Its ahead-of-time cache cannot be read back in 0.32: it would compile at every start.
            "VLLM_USE_AOT_COMPILE": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        }
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **ours}
