"""Several servers behind the Envoy of `deploy/envoy/`: who is asked, who is not, and what is lost when one goes.

The short form is part of every run; `make test-mesh` sets MESH_SECONDS and prints the figures.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc
from mesh_harness import MESH_SECONDS, NO_RETRIES, ROOT, WAIT_S, Load, call, front, replicas, report, whole_answer
from server_harness import Client, make_server, outcome

# All tests share three servers, so they run on one loop, and each leaves the servers as it found them.
pytestmark = pytest.mark.asyncio(loop_scope="module")
module_fixture = pytest_asyncio.fixture(loop_scope="module", scope="module")

ROWS = 4  # of each server; more wait in its queue, where nothing has begun
CALLERS = 36
# Longer than a worker that runs waits for a core on a busy machine.
WORKER_TIMEOUT_S = 3.0
ROUNDS = max(1, round(MESH_SECONDS / 15))
long_form = pytest.mark.skipif(not MESH_SECONDS, reason="make test-mesh runs it")


@module_fixture
async def servers():
    async with replicas(3, engine={"max_running_sequences": ROWS}) as started:
        yield started


@module_fixture
async def mesh(servers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("envoy")
    async with front("envoy.yaml", [each.port for each in servers], folder) as started:
        await started.all_healthy()
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def client(mesh):
    connected = Client(mesh.port, NO_RETRIES)
    yield connected
    await connected.channel.close()


async def test_requests_of_one_connection_are_balanced(mesh, servers, client):
    """A channel is one connection, yet its streams spread: of 12 at once, no server gets more than half."""
    for _ in range(30):  # until Envoy has a connection to each
        assert (await call(client)).code == "OK"
    held = [client.generate("hold") for _ in range(12)]
    await mesh.until(lambda hosts: sum(each["rq_active"] for each in hosts.values()) == 12)
    opened = [each["rq_active"] for each in mesh.hosts().values()]
    for each in held:
        each.cancel()
    await mesh.until(lambda hosts: not any(each["rq_active"] for each in hosts.values()))
    # The better of two at random: 7 of 12 on one server come less than once in ten thousand runs.
    assert all(2 <= count <= 6 for count in opened), opened


async def test_a_replica_that_does_not_serve_gets_nothing(servers, tmp_path):
    """While a server loads its models it is asked for its health only; when it serves, it is asked like the others."""
    loading = make_server()
    port = await loading.start()
    try:
        async with front("envoy.yaml", [servers[0].port, port], tmp_path) as mesh:
            client = Client(mesh.port, NO_RETRIES)
            assert [await outcome(client.generate()) for _ in range(30)] == ["OK"] * 30
            assert mesh.hosts()[port]["rq_total"] == 0
            await loading.ready()
            await mesh.all_healthy()
            while not mesh.hosts()[port]["rq_total"]:
                assert await outcome(client.generate()) == "OK"
            await client.channel.close()
    finally:
        await loading.drain_and_stop(0.0)


async def test_kill_9_under_load_loses_only_what_had_begun(mesh, servers):
    """Kill -9 of a server with calls running and queued: what had not begun is done elsewhere, every time."""
    calls = []
    for round_number in range(ROUNDS):
        victim = servers[round_number % 3]
        load = Load(mesh.port, CALLERS)
        await load.until(2 * CALLERS)
        await victim.kill()
        await load.until(4 * CALLERS)
        calls += await load.stop()
        await victim.start()
        await mesh.all_healthy()
    failed = report(f"kill -9 of one of three servers, {ROUNDS} times", calls)
    assert [each for each in failed if not each.begun] == []
    assert {each.code for each in failed} <= {"UNAVAILABLE", "INTERNAL"}  # a stream that is cut off, as gRPC tells it


async def test_kill_9_loses_no_whole_answer(mesh, servers):
    """A unary call, such as those of the earlier HTTP API, has sent nothing before its end: kill -9 fails none."""
    load = Load(mesh.port, CALLERS, whole_answer)
    await load.until(CALLERS)
    await servers[1].kill()
    await load.until(2 * CALLERS)
    failed = report("kill -9 of one of three servers, unary calls", await load.stop())
    await servers[1].start()
    await mesh.all_healthy()
    assert failed == []


async def test_rolling_restart_fails_no_stream(mesh, servers):
    """SIGTERM to one server after the other (two in the short form), each replaced, under load: no stream fails."""
    load = Load(mesh.port, CALLERS)
    for _ in range(ROUNDS):
        for each in servers if MESH_SECONDS else servers[:2]:
            await load.until(CALLERS)
            each.process.terminate()
            assert await each.ended() == 0
            await each.start()
            await mesh.all_healthy()
    failed = report(f"rolling restart of three servers, {ROUNDS} times", await load.stop())
    assert failed == []


async def test_a_stalled_worker_costs_only_what_it_had_begun(servers, tmp_path):
    """A worker that hangs (SIGSTOP) is replaced, what waited for it is done elsewhere, and its server serves again."""
    engine = {"max_running_sequences": ROWS}
    async with (
        replicas(1, engine=engine, worker_timeout_s=WORKER_TIMEOUT_S) as (victim,),
        front("envoy.yaml", [victim.port, servers[0].port, servers[1].port], tmp_path) as mesh,
    ):
        await mesh.all_healthy()
        load = Load(mesh.port, CALLERS)
        await load.until(CALLERS)
        os.kill(victim.worker_pid, signal.SIGSTOP)
        await mesh.until(lambda hosts: not hosts[victim.port]["healthy"])
        await mesh.all_healthy()
        await load.until(CALLERS)
        failed = report("a stalled worker of one of three servers", await load.stop())
    assert [each for each in failed if not each.begun] == []
    assert {each.code for each in failed} <= {"UNAVAILABLE"}
    assert len(failed) <= ROWS


@long_form
async def test_a_stalled_server_costs_only_what_it_had_begun(mesh, servers):
    """A server that hangs answers no ping: in 15 s Envoy ends its streams, and tries what had not begun elsewhere."""
    load = Load(mesh.port, CALLERS)
    await load.until(CALLERS)
    servers[0].process.send_signal(signal.SIGSTOP)
    await mesh.until(lambda hosts: not hosts[servers[0].port]["healthy"])
    await mesh.until(lambda hosts: not hosts[servers[0].port]["rq_active"])
    servers[0].process.send_signal(signal.SIGCONT)
    await mesh.all_healthy()
    failed = report("a stalled server, one of three", await load.stop())
    assert [each for each in failed if not each.begun] == []


async def test_affinity_sends_equal_headers_to_one_replica(servers, tmp_path):
    """With envoy-affinity.yaml, the value of a header chooses the server, and another one if that is gone."""
    async with front("envoy-affinity.yaml", [each.port for each in servers], tmp_path) as mesh:
        client = Client(mesh.port, NO_RETRIES)

        async def asked(value, calls=6):
            """The ports that got calls with this value."""
            before = mesh.hosts()
            for _ in range(calls):
                assert (await call(client, metadata=(("x-lda-prompt-hash", value),))).code == "OK"
            return {port for port, now in mesh.hosts().items() if now["rq_success"] > before[port]["rq_success"]}

        chosen = [await asked(f"prompt {n}") for n in range(8)]
        assert {len(ports) for ports in chosen} == {1}
        assert len(set.union(*chosen)) > 1
        (home,) = chosen[0]
        gone = next(each for each in servers if each.port == home)
        await gone.kill()
        assert home not in await asked("prompt 0")
        await client.channel.close()
    await gone.start()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Folders with certificates of one authority, for this namespace and for another one."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("default", "elsewhere")}
    for namespace, folder in folders.items():
        for name in ("ca.crt", "ca.key"):
            if namespace == "elsewhere":
                (folder / name).write_bytes((folders["default"] / name).read_bytes())
        subprocess.run([ROOT / "deploy/certificates.sh", folder, namespace], check=True)
    return folders


class Answers(lda_service_pb2_grpc.LdaServiceServicer):
    """Knows one method."""

    async def GetLoad(self, request, context):  # noqa: N802
        return pb.GetLoadResponse(accepts_work=True)


class Healthy(health_pb2_grpc.HealthServicer):
    async def Check(self, request, context):  # noqa: N802
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def tls_server(folder):
    """A server that asks its callers for a certificate; (server, port)."""
    key, certificate, ca = ((folder / name).read_bytes() for name in ("server.key", "server.crt", "ca.crt"))
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    server = grpc.aio.server()
    lda_service_pb2_grpc.add_LdaServiceServicer_to_server(Answers(), server)
    health_pb2_grpc.add_HealthServicer_to_server(Healthy(), server)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    return server, port


def hand_to_envoy(certificates, folder):
    """Lay certificates where envoy-mtls.yaml looks for them."""
    (folder / "tls").mkdir()
    for name, source in {"ca.crt": "ca.crt", "tls.crt": "client.crt", "tls.key": "client.key"}.items():
        (folder / "tls" / name).write_bytes((certificates / source).read_bytes())


async def test_mutual_tls_to_the_servers(certificates, tmp_path):
    """With envoy-mtls.yaml, calls and health checks pass over TLS; a caller without a certificate does not."""
    hand_to_envoy(certificates["default"], tmp_path)
    server, port = await tls_server(certificates["default"])
    async with front("envoy-mtls.yaml", [port], tmp_path) as mesh:
        await mesh.all_healthy()
        client = Client(mesh.port, NO_RETRIES)
        assert (await client.lda.GetLoad(pb.GetLoadRequest(), timeout=WAIT_S)).accepts_work
        await client.channel.close()
    stranger = Client(port, NO_RETRIES)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stranger.lda.GetLoad(pb.GetLoadRequest(), timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await stranger.channel.close()
    await server.stop(None)


async def test_a_server_with_another_name_is_refused(certificates, tmp_path):
    """A certificate of the same authority in another name is not the servers': no call reaches it."""
    hand_to_envoy(certificates["default"], tmp_path)
    server, port = await tls_server(certificates["elsewhere"])
    async with front("envoy-mtls.yaml", [port], tmp_path) as mesh:
        client = Client(mesh.port, NO_RETRIES)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.lda.GetLoad(pb.GetLoadRequest(), timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert re.search("no healthy upstream", caught.value.details())
        assert mesh.stat("ssl.fail_verify_san") > 0
        await client.channel.close()
    await server.stop(None)
