"""Serve on this machine, with the application of `serve.yaml`: for the tests and for `measure.py`.

Knows processes and ports; nothing of what is asked.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil  # type: ignore[import-untyped]
import yaml
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc
from lda_ray import HAPROXY, REPLICA_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
START_S, STOP_S, CALL_S = 120.0, 60.0, 5.0
# Ports that Serve would take for itself besides the two of its configuration.
PORT_VARIABLES = (
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
)


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        target: where Serve takes gRPC.
        size: replicas that it should have.
        process: `serve run`, from which all other processes descend.
    """

    target: str
    size: int
    process: subprocess.Popen[bytes]

    def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        descendants = psutil.Process(self.process.pid).children(recursive=True)
        return [each.pid for each in descendants if _title(each).startswith("ray::ServeReplica:")]

    def loads(self) -> dict[str, pb.GetLoadResponse]:
        """How busy each replica is, by its name in Serve, once all of them answer.

        Raises:
            TimeoutError: they do not.
        """
        found: dict[str, pb.GetLoadResponse] = {}
        until = time.monotonic() + START_S
        with grpc.insecure_channel(self.target) as channel:
            stub = lda_service_pb2_grpc.LdaServiceStub(channel)
            while len(found) < self.size:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise TimeoutError(f"{len(found)} of {self.size} replicas answer at {self.target}.")
                try:
                    load, call = stub.GetLoad.with_call(pb.GetLoadRequest(), timeout=CALL_S)
                    found[str(dict(call.trailing_metadata())[REPLICA_KEY])] = load
                except grpc.RpcError:
                    found.clear()
                    time.sleep(0.05)
        return found


@contextmanager
def serving(
    log: Path, *, size: int = 2, flags: str = "", import_path: str = "lda_ray:app", path: str = ""
) -> Iterator[Cluster]:
    """`serve run` with the application of `serve.yaml` on free ports, up to its end.

    Args:
        log: where the output of all processes goes; the configuration is written beside it.
        size: replicas.
        flags: of `lda-service serve`.
        import_path: of another application.
        path: a folder in which that is found.
    """
    ports = [_free_port() for _ in range(2 + len(PORT_VARIABLES))]
    config = _config(ports[0], ports[1], size=size, flags=flags, import_path=import_path)
    file = log.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODEL_")}
    environment |= {name: str(port) for name, port in zip(PORT_VARIABLES, ports[2:], strict=True)}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), path, os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        HAPROXY: "1",
    }
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    cluster = Cluster(f"127.0.0.1:{ports[1]}", size, process)
    try:
        cluster.loads()
        yield cluster
    finally:
        process.terminate()
        process.wait(STOP_S)


def _config(http_port: int, grpc_port: int, *, size: int, flags: str, import_path: str) -> Any:
    config = yaml.safe_load((HERE / "serve.yaml").read_text())
    config["http_options"]["port"], config["grpc_options"]["port"] = http_port, grpc_port
    [application] = config["applications"]
    application |= {"import_path": import_path, "args": {"flags": flags}}
    [deployment] = application["deployments"]
    deployment["num_replicas"] = size
    deployment["ray_actor_options"]["num_cpus"] = 0.1  # the machine may have fewer cores than there are replicas
    return config


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
