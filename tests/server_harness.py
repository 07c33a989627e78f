"""A real server over the fake engine, and a real client, for the `test_server_*` files.

Run as a program it serves until a signal, and prints its port, the worker's process id, and "ready".
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import grpc
import uvloop
from fake_engine import FakePrompter
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from lda_client.gen.lda.v1 import admin_service_pb2_grpc, completion_service_pb2_grpc, lda_service_pb2_grpc
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

from lda_service.config import (
    AccessConfig,
    AdmissionConfig,
    Config,
    EngineConfig,
    PairConfig,
    ServerConfig,
    TelemetryConfig,
)
from lda_service.rpc.server import LdaServer, run
from lda_service.telemetry import configure_logging

SERVICE = "lda.v1.LdaService"


def make_server(
    factory="fake_engine:load", engine=None, admission=None, access=None, telemetry=None, tracing=None, **server
):
    """A server on a free port, not started."""
    config = Config(
        PairConfig("a", "b"),
        engine or EngineConfig(),
        ServerConfig(**{"port": 0, **server}),
        admission or AdmissionConfig(),
        access or AccessConfig(),
        telemetry or TelemetryConfig(),
    )
    return LdaServer(config, factory, lambda model_id: FakePrompter(), tracing)


@dataclass
class Client:
    """A channel and the stubs over it."""

    port: int
    options: tuple = ()
    credentials: grpc.ChannelCredentials | None = None
    channel: grpc.aio.Channel = field(init=False)

    def __post_init__(self):
        target = f"127.0.0.1:{self.port}"
        if self.credentials is None:
            self.channel = grpc.aio.insecure_channel(target, options=self.options)
        else:
            self.channel = grpc.aio.secure_channel(target, self.credentials, options=self.options)
        self.lda = lda_service_pb2_grpc.LdaServiceStub(self.channel)
        self.completions = completion_service_pb2_grpc.CompletionServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def generate(self, text="hi", *, timeout=30, metadata=None, tokens=3, **fields):
        request = pb.GenerateLDARequest(prompt=pb.Prompt(text=text), **fields)
        if not request.stopping.HasField("max_new_tokens"):
            request.stopping.max_new_tokens = tokens
        return self.lda.GenerateLDA(request, timeout=timeout, metadata=metadata)

    async def engine_cancelled(self, generation_id):
        """Wait until the engine was told to cancel this generation."""
        assert await outcome(self.generate(f"cancelled? {generation_id}")) == "OK"

    async def load(self):
        return await self.lda.GetLoad(pb.GetLoadRequest(), timeout=30)

    def watch(self, service=SERVICE):
        return self.health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=30)

    async def health_of(self, service=SERVICE):
        response = await self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


@asynccontextmanager
async def serving(*, ready=True, **options):
    """A server that is ready, and a client of it."""
    server = make_server(**options)
    client = Client(await server.start())
    try:
        if ready:
            await server.ready()
        yield server, client
    finally:
        await client.channel.close()
        await server.drain_and_stop(0.0)


@dataclass
class Failure:
    """What a failed call carries."""

    code: str
    message: str
    details: dict[str, object]
    initial: dict[str, str]
    trailing: dict[str, object]

    @property
    def reason(self):
        return self.details["ErrorInfo"].reason

    @property
    def metadata(self):
        return dict(self.details["ErrorInfo"].metadata)

    @property
    def fields(self):
        bad_request = self.details.get("BadRequest")
        return [each.field for each in bad_request.field_violations] if bad_request else []


async def messages(call):
    """The messages of a call; unlike iteration, this may follow a `read`."""
    while (message := await call.read()) is not grpc.aio.EOF:
        yield message


async def outcome(call):
    """Read a call to its end; the name of its code, which gRPC does not know before that."""
    with suppress(grpc.aio.AioRpcError):
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            async for _ in messages(call):
                pass
    return (await call.code()).name


async def failure(call):
    """Read a call to its end, which must be an error."""
    code, trailing = await outcome(call), await call.trailing_metadata()
    assert code != "OK"
    status = await rpc_status.aio.from_call(call)
    details = {}
    for packed in status.details if status else ():
        name = packed.type_url.rpartition(".")[2]
        details[name] = getattr(error_details_pb2, name).FromString(packed.value)
    return Failure(code, await call.details(), details, dict(await call.initial_metadata()), dict(trailing))


async def _main(rows, telemetry):
    server = make_server(engine=EngineConfig(max_running_sequences=rows), telemetry=telemetry)

    def on_ready(pair):
        print("worker", server.worker.pid, flush=True)
        print("ready", flush=True)

    await run(server, lambda port: print("port", port, flush=True), on_ready)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--telemetry", type=json.loads, help="fields of TelemetryConfig in JSON; logs as they say")
    options = parser.parse_args()
    asked = TelemetryConfig(**options.telemetry) if options.telemetry else None
    if asked:
        configure_logging(asked.log_format, asked.log_level)
    uvloop.run(_main(options.rows, asked))
    sys.exit(0)
