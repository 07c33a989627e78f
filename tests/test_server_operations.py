"""Health, drain, slow readers, signals, and what an operator sees when the server cannot start."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from fake_engine import SECRET
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from server_harness import Client, failure, make_server, messages, outcome, serving

from lda_service import cli
from lda_service.errors import InternalError, ModelNotFound, PortInUse
from lda_service.rpc.server import OPTIONS

STATUS: EnumTypeWrapper = health_pb2.HealthCheckResponse.ServingStatus
HARNESS = Path(__file__).with_name("server_harness.py")


async def test_not_serving_until_ready():
    """Before the warm-up the process is alive but the service is not; calls are refused before headers."""
    async with serving(ready=False) as (server, client):
        watch = client.watch()
        assert (await client.health_of(""), await client.health_of()) == ("SERVING", "NOT_SERVING")
        refused = await failure(client.generate())
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "LOADING")
        assert refused.details["RetryInfo"].retry_delay.seconds == 1
        assert "x-generation-id" not in refused.initial
        await server.ready()
        assert [STATUS.Name((await watch.read()).status) for _ in range(2)] == ["NOT_SERVING", "SERVING"]
        assert await outcome(client.generate()) == "OK"


async def test_health_knows_its_names():
    """Check of a name nobody serves is NOT_FOUND; Watch of one reports SERVICE_UNKNOWN and stays open."""
    async with serving() as (_, client):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.health_of("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = client.watch("nobody")
        assert STATUS.Name((await watch.read()).status) == "SERVICE_UNKNOWN"
        watch.cancel()


async def test_an_idle_watcher_does_not_hold_up_the_stop():
    """A watcher sees NOT_SERVING, its stream ends, and the stop takes no grace period."""
    async with serving() as (server, client):
        watch = client.watch()
        assert STATUS.Name((await watch.read()).status) == "SERVING"
        begun = time.perf_counter()
        await server.drain_and_stop(30.0)
        assert time.perf_counter() - begun < 3
        assert STATUS.Name((await watch.read()).status) == "NOT_SERVING"
        assert await outcome(watch) == "UNAVAILABLE"


async def test_drain_lets_running_streams_end():
    """During a drain, running streams go on to their end and new calls are refused."""
    async with serving() as (server, client):
        call = client.generate(tokens=300)
        await call.read()
        watch = client.watch()
        draining = asyncio.ensure_future(server.drain_and_stop(30.0))
        while STATUS.Name((await watch.read()).status) == "SERVING":
            pass
        refused = await failure(client.generate())
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "DRAINING")
        assert await outcome(call) == "OK"
        await draining


async def test_drain_aborts_what_outlives_the_grace():
    """A stream that does not end in time is told why."""
    async with serving() as (server, client):
        call = client.generate("hold")
        await call.read()
        await server.drain_and_stop(0.2)
        aborted = await failure(call)
        assert (aborted.code, aborted.reason) == ("ABORTED", "ABORTED")


async def test_a_stalled_reader_is_ended_alone():
    """A reader that stops ends SLOW_CONSUMER, the engine stops working for it, and neighbours go on."""
    async with serving(max_buffered_tokens=50) as (_, client):
        stalled = client.generate("wide", tokens=4096)
        generation_id = (await stalled.read()).started.generation_id
        neighbour = Client(client.port)
        assert await outcome(neighbour.generate(tokens=26)) == "OK"
        await neighbour.engine_cancelled(generation_id)
        load = await neighbour.load()
        assert load.open_requests == 0, "its place is free, though its handler is stuck in a write"
        await neighbour.channel.close()
        ended = await failure(stalled)
        assert (ended.code, ended.reason) == ("RESOURCE_EXHAUSTED", "SLOW_CONSUMER")
        assert ended.metadata == {"buffered_tokens": "51"}


def test_grpc_knows_every_option():
    """GRPC ignores unknown keys silently: a misspelled ping interval ends silent streams with "Too many pings"."""
    library = Path(cygrpc.__file__).read_bytes()
    assert [key for key, _ in OPTIONS if key.encode() + b"\0" not in library] == []
    assert dict(OPTIONS)["grpc.http2.max_ping_strikes"] == 0


async def test_reflection_lists_the_services():
    """A client without the contract can ask for it."""
    async with serving() as (_, client):
        stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        listed = {service.name async for each in messages(call) for service in each.list_services_response.service}
        ours = {f"lda.v1.{name}Service" for name in ("Lda", "Completion", "Admin")}
        assert listed == ours | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_port_in_use():
    """A taken port is found before any model is touched, and the error names the remedy."""
    async with serving(ready=False) as (_, client):
        second = make_server("fake_engine:load_broken", port=client.port)
        with pytest.raises(PortInUse, match=r"--port"):
            await second.start()
        assert second.worker.pid is None


@pytest.mark.parametrize(
    ("factory", "error"),
    [("fake_engine:load_missing", ModelNotFound), ("fake_engine:load_broken", InternalError)],
)
async def test_failed_start_is_final(factory, error):
    """A pair that cannot be loaded is the operator's to fix: one error, no second attempt, no text of the fault."""
    async with serving(ready=False, factory=factory) as (server, client):
        with pytest.raises(error) as caught:
            await server.ready()
        assert SECRET not in caught.value.message
        assert await client.health_of() == "NOT_SERVING"


async def test_worker_that_dies_while_loading_is_final():
    """A worker killed during the first load is a start-up error too: usually memory ran out."""
    async with serving(ready=False, factory="fake_engine:load_and_die") as (server, _):
        with pytest.raises(Exception, match="while loading the models"):
            await server.ready()


async def test_worker_faults_in_a_step_end_every_stream():
    """When the worker's process ends by itself, neighbours learn it at once too."""
    async with serving() as (_, client):
        neighbour = client.generate("hold")
        await neighbour.read()
        for call in (client.generate("exit"), neighbour):
            ended = await failure(call)
            assert (ended.code, ended.reason) == ("UNAVAILABLE", "WORKER_DIED")


@asynccontextmanager
async def server_process():
    """A server in a process of its own: (process, client, worker's process id)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HARNESS), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    printed = [(await process.stdout.readline()).decode().split() for _ in range(3)]
    client = Client(int(printed[0][1]))
    try:
        yield process, client, int(printed[1][1])
    finally:
        await client.channel.close()
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_drain(number):
    """SIGTERM and Ctrl-C let running streams end, then the process ends with code 0."""
    async with server_process() as (process, client, _):
        call = client.generate(tokens=200)
        await call.read()
        process.send_signal(number)
        assert await outcome(call) == "OK"
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_second_signal_stops_at_once():
    """An impatient operator does not wait for the grace period; the stream is still told why."""
    async with server_process() as (process, client, _):
        call, watch = client.generate("hold"), client.watch()
        await call.read()
        await watch.read()
        process.terminate()
        assert STATUS.Name((await watch.read()).status) == "NOT_SERVING"
        process.terminate()
        assert (await failure(call)).reason == "ABORTED"
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_the_worker_dies_with_the_server():
    """Kill -9 of the server leaves no process behind that holds the models."""
    async with server_process() as (process, _, worker_pid):
        worker = os.pidfd_open(worker_pid)
        process.kill()
        ended, _, _ = await asyncio.to_thread(select.select, [worker], [], [], 10)
        os.close(worker)
        assert ended


def test_only_one_model_set_is_a_mistake():
    """The command says which variable is missing, and exits with 1."""
    result = CliRunner().invoke(cli.main, ["serve"], env={"MODEL_AFTER_ID": "a"})
    assert result.exit_code == 1
    assert "set MODEL_BEFORE_ID too" in result.stderr


async def test_command_names_the_taken_port():
    """`python -m lda_service serve` on a taken port: one sentence on stderr, exit code 1, the demo pair announced."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lda_service", "serve"),
            env={**os.environ, "PORT": port},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert f"Another process listens on 127.0.0.1:{port}" in err.decode()
    assert "BUNDLED DEMO PAIR" in err.decode()


def test_every_flag_has_help():
    """No option of the command is left unexplained, except those whose choices explain them."""
    unexplained = {option.name for option in cli.serve.params if not option.help}
    assert unexplained == {"dtype"}


async def test_pair_and_report_need_a_loaded_pair():
    """Reports about the pair are refused until there is one."""
    async with serving(ready=False) as (_, client):
        for call in (
            client.lda.GetModelPair(pb.GetModelPairRequest(), timeout=30),
            client.lda.TokenizerCompat(pb.TokenizerCompatRequest(), timeout=30),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
