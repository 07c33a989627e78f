"""The command `lda-service serve` as a process, over two tiny random models, for the programs of this folder."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path[:0] = [path for path in map(str, (ROOT, TESTS)) if path not in sys.path]

from tiny_models import save_model  # noqa: E402


@dataclass
class Live:
    """A running server."""

    process: asyncio.subprocess.Process
    port: int
    log: Path

    @property
    def target(self):
        return f"127.0.0.1:{self.port}"

    def children(self):
        """Ids of the processes that any of its threads started."""
        lists = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(each) for path in lists for each in path.read_text().split()]

    def worker(self):
        """The process that owns the models: the largest of the children; None while there is none."""
        return max(self.children(), key=resident_bytes, default=None)


def resident_bytes(pid):
    """Memory of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


@asynccontextmanager
async def serving(folder, *flags, command=("-m", "lda_service", "serve")):
    """A server that is ready; its log is in the folder. It is stopped by SIGTERM, and killed if that takes long."""
    folder = Path(folder)
    environment = dict(os.environ, PORT="0", OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "clients/python", TESTS)))
    log = folder / "server.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, *flags, stdout=asyncio.subprocess.PIPE, stderr=file, cwd=ROOT, env=environment
        )
        try:
            port = int((await _line(process, ("listening", "port"))).split()[-1].rpartition(":")[2])
            await _line(process, ("ready",))
            yield Live(process, port, log)
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), 60)
                except TimeoutError:
                    process.kill()
                    raise


def tiny_pair(folder, **settings):
    """Flags that name two random models, made in the folder."""
    names = zip(("after", "before"), (1, 2), strict=True)
    after, before = (save_model(Path(folder) / side, seed=seed, **settings) for side, seed in names)
    return "--model-after-id", str(after), "--model-before-id", str(before)


async def _line(process, beginnings):
    """The next line of the output that begins with one of these words."""
    while line := (await process.stdout.readline()).decode():
        if line.startswith(beginnings):
            return line.strip()
    raise RuntimeError("the server ended while it was starting; see its log")
