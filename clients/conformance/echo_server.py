"""The real server over the fake engine of the tests, in several configurations, each on a free port.

    python echo_server.py FOLDER NAME...      prints {"NAME": port} once all are ready, serves until SIGTERM

FOLDER holds the certificates and tokens that `servers.prepare_access` writes. The prompt steers the fake engine:
tests/fake_engine.py says how.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from server_harness import make_server

from lda_service.config import AccessConfig, AdmissionConfig, EngineConfig
from lda_service.rpc import server as rpc_server

# Of the server `draining`. The real notice is shorter than the pauses between four attempts: the last would find the
# port closed.
DRAIN_NOTICE_S = 10.0


def never_loads(config: Any) -> None:
    """A factory of an engine whose models take for ever."""
    time.sleep(3600)


def configuration(name: str, folder: Path) -> dict[str, Any]:
    """The arguments of `make_server` for a server of this name."""
    tls = AccessConfig(folder / "tokens", tls_cert=folder / "server.crt", tls_key=folder / "server.key")
    configurations: dict[str, dict[str, Any]] = {
        "echo": {},
        "disposable": {},
        "draining": {},
        "small": {"engine": EngineConfig(max_running_sequences=1)},
        "one_caller": {"admission": AdmissionConfig(max_requests_per_caller=1)},
        "loading": {"factory": "echo_server:never_loads"},
        "tls": {"access": tls},
        "secure": {"access": replace(tls, tls_client_ca=folder / "ca.pem")},
    }
    return configurations[name]


async def main(folder: Path, names: list[str]) -> None:
    """Serve all of them until one signal, which drains them."""
    stop, ports, loaded = asyncio.Event(), {}, asyncio.Event()
    ready = {"loading"} & set(names)
    if "draining" in names:
        rpc_server.DRAIN_NOTICE_S = DRAIN_NOTICE_S

    async def serve(name: str) -> None:
        def on_listening(port: int) -> None:
            ports[name] = port

        def on_ready(_: Any) -> None:
            ready.add(name)
            if ready == set(names):
                loaded.set()

        await rpc_server.run(make_server(**configuration(name, folder)), on_listening, on_ready, stop)

    async def announce() -> None:
        await loaded.wait()
        print(json.dumps(ports), flush=True)

    await asyncio.gather(announce(), *map(serve, names))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
