"""A server over the fake engine in a process of its own, with Envoy before it or without.

    python replica.py OPTIONS

OPTIONS is JSON: settings of `ServerConfig`, those of `EngineConfig` under "engine", and under "http" the port of the
gateway. Prints `listening PORT`, `http PORT`, `worker PID` and `ready`, and serves until a signal.
"""

from __future__ import annotations

import asyncio
import json
import sys

from server_harness import make_server

from lda_service import gateway
from lda_service.config import EngineConfig, HttpConfig, ServerConfig
from lda_service.errors import LdaError
from lda_service.rpc.server import run


async def main(options):
    engine, http = EngineConfig(**options.pop("engine", {})), options.pop("http", None)
    server = make_server("mesh_engine:load", engine, **options)

    def say(what, value=""):
        print(what, value, flush=True)

    def on_ready(pair):
        say("worker", server.worker.pid)
        say("ready")

    def on_listening(port):
        say("listening", port)

    if http is None:
        return await run(server, on_listening, on_ready)
    settings = ServerConfig(**options)
    return await gateway.run(
        server, settings, HttpConfig(port=http), on_listening, lambda port: say("http", port), on_ready
    )


if __name__ == "__main__":
    try:
        asyncio.run(main(json.loads(sys.argv[1])))
    except LdaError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
