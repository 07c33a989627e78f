"""Bad input by the hundred thousand: `python tests/reliability/fuzz.py --requests 100000`, or `make fuzz`.

Messages are made from the descriptors of the contract: fields left out, at their limits, beyond them, and nonsense;
some are then damaged as bytes. They go to a real server over tiny models, together with odd metadata, deadlines,
unknown methods, and raw garbage on the port. Every answer must be one that the contract documents: no INTERNAL, no
UNKNOWN, no hang, and afterwards the server must be healthy with nothing left open.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import math
import random
import re
import sys
import tempfile
import time

import grpc
from google.protobuf.descriptor import FieldDescriptor as Field
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lda_client.gen.lda.v1 import admin_service_pb2, completion_service_pb2, lda_service_pb2, lda_service_pb2_grpc
from live_server import ROOT, serving, tiny_pair

FILES = (lda_service_pb2, completion_service_pb2, admin_service_pb2)
DOCUMENTED = {
    reason: code
    for code, reason in re.findall(
        r"// ([A-Z_]+)\. [^=]*?ERROR_REASON_([A-Z_]+) = ", (ROOT / "proto/lda/v1/lda_service.proto").read_text()
    )
}
# What gRPC and the transport say themselves, without a reason of ours.
OF_THE_TRANSPORT = {"DEADLINE_EXCEEDED", "CANCELLED", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"}
LIMIT_S = 60.0
TEXTS = (
    "",
    "a",
    "Hi there",
    "\x00",
    "é",
    "🙂" * 9,
    "<|end|>",
    "{{ 7 * 7 }}",
    "%s%n",
    "../../etc/passwd",
    "a" * 5000,
    "\ufffe",
)
INTEGERS = (0, 1, 2, 3, 7, 8, 16, 64, 255, 256, 1024, 131072, 2**31 - 1, 2**31, 2**32 - 1)
LONGS = (*INTEGERS, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (
    0.0,
    -0.0,
    1e-30,
    0.1,
    0.5,
    0.95,
    1.0,
    1.0001,
    2.0,
    10.0,
    100.0,
    101.0,
    -1.0,
    -100.0,
    3e38,
    math.inf,
    -math.inf,
    math.nan,
)
METADATA = (
    ("x-request-id", "fuzz"),
    ("x-request-id", "x" * 500),
    ("traceparent", "00-zz-yy-01"),
    ("authorization", "Bearer nonsense"),
    ("grpc-accept-encoding", "nonsense"),
    ("x-odd-bin", b"\x00\xff"),
)


class Maker:
    """Makes messages from descriptors. `boldness` is the chance that a value is beyond what the contract allows."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.boldness = 0.1

    def message(self, descriptor, depth=0):
        """A message of this type, deeper ones mostly empty."""
        message = descriptor._concrete_class()
        for field in descriptor.fields:
            if self.rng.random() < (0.55 if depth < 3 else 0.25):
                self._fill(message, field, depth)
        return message

    def _fill(self, message, field, depth):
        if field.is_repeated:
            count = (
                self.rng.choice((0, 1, 1, 2, 3, 17, 65))
                if self.rng.random() < self.boldness
                else self.rng.randint(0, 2)
            )
            target = getattr(message, field.name)
            for _ in range(count):
                if field.type == Field.TYPE_MESSAGE:
                    target.add().CopyFrom(self.message(field.message_type, depth + 1))
                else:
                    target.append(self._scalar(field))
        elif field.type == Field.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(self.message(field.message_type, depth + 1))
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field):
        rng, bold = self.rng, self.rng.random() < self.boldness
        if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
            return rng.choice(FLOATS) if bold else rng.uniform(0.01, 0.99)
        if field.type == Field.TYPE_BOOL:
            return rng.random() < 0.5
        if field.type == Field.TYPE_STRING:
            return (
                rng.choice(TEXTS)
                if bold or rng.random() < 0.5
                else "".join(rng.choices("ab c é🙂", k=rng.randint(1, 12)))
            )
        if field.type == Field.TYPE_BYTES:
            return rng.randbytes(rng.randint(0, 9))
        if field.type == Field.TYPE_ENUM:
            return rng.choice([value.number for value in field.enum_type.values])
        if field.type in (Field.TYPE_UINT64, Field.TYPE_FIXED64):
            return rng.choice(LONGS) if bold else rng.randint(1, 4)
        if field.type in (Field.TYPE_INT64, Field.TYPE_INT32):
            return rng.choice((-1, 0, 1, 2**31 - 1)) if bold else rng.randint(0, 3)
        return rng.choice(INTEGERS) if bold else rng.randint(1, 4)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a message, spoilt."""
    data = bytearray(data or b"\x0a\x00")
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(4):
            case 0:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case 1:
                del data[rng.randrange(len(data)) :]
            case 2:
                data += rng.randbytes(rng.randint(1, 20))
            case _:
                at = rng.randrange(len(data))
                data[at:at] = rng.randbytes(rng.randint(1, 5))
        data = data or bytearray(b"\x00")
    return bytes(data)


class Fuzzer:
    """Sends requests and judges the answers."""

    def __init__(self, target: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.maker = Maker(self.rng)
        self.channels = [grpc.aio.insecure_channel(target, options=(("channel", i),)) for i in range(4)]
        self.methods = [
            (f"/{service.full_name}/{method.name}", method)
            for file in FILES
            for service in file.DESCRIPTOR.services_by_name.values()
            for method in service.methods
        ]
        self.answers: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []

    async def run(self, requests: int, at_once: int) -> None:
        """All requests, some at once."""
        left = iter(range(requests))

        async def lane():
            for _ in left:
                await self._one()

        await asyncio.gather(*(lane() for _ in range(at_once)))
        for channel in self.channels:
            await channel.close()

    async def _one(self) -> None:
        rng = self.rng
        path, method = rng.choice(self.methods)
        self.maker.boldness = rng.choice((0.0, 0.03, 0.1, 0.5))
        data = self.maker.message(method.input_type).SerializeToString()
        if rng.random() < 0.15:
            data = damaged(data, rng)
        if rng.random() < 0.01:
            path += "x"
        timeout = rng.choice((1e-6, 0.001, 0.01)) if rng.random() < 0.05 else LIMIT_S
        metadata = rng.sample(METADATA, rng.randint(0, 2)) if rng.random() < 0.2 else None
        give_up = rng.randint(1, 3) if rng.random() < 0.05 else None
        await self._judge(path, data, await self._call(path, method, data, timeout, metadata, give_up), timeout)

    async def _call(self, path, method, data, timeout, metadata, give_up):
        channel = self.rng.choice(self.channels)
        kind = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = kind(path)(data, timeout=timeout, metadata=metadata)
        try:
            if not method.server_streaming:
                await call
                return None
            count = 0
            async for _ in call:
                count += 1
                if count == give_up:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            return error
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            self.answers["CANCELLED"] += 1
            return False
        return None

    async def _judge(self, path, data, error, timeout) -> None:
        if error is False:
            return
        if error is None:
            self.answers["OK"] += 1
            return
        code, reason = error.code().name, reason_of(error)
        self.answers[f"{code} {reason or ''}".strip()] += 1
        fits = DOCUMENTED.get(reason) == code if reason else code in OF_THE_TRANSPORT
        late = code == "DEADLINE_EXCEEDED" and not reason and timeout == LIMIT_S
        if not fits or late or code in ("INTERNAL", "UNKNOWN"):
            self.faults.append(f"{path} {code} {reason} {error.details()!r} for {data[:300]!r}")


def reason_of(error) -> str | None:
    """The reason in the details of an error, if it has one."""
    packed = next((value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin"), b"")
    for detail in status_pb2.Status.FromString(packed).details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            return error_details_pb2.ErrorInfo.FromString(detail.value).reason
    return None


async def garbage(port: int, connections: int, rng: random.Random) -> None:
    """Connections that speak no gRPC: noise, half a preface, frames that make no sense, silence."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    empty_settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

    async def one():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = rng.choice(
            (
                rng.randbytes(rng.randint(1, 2000)),
                preface[: rng.randint(1, len(preface))],
                preface + rng.randbytes(rng.randint(1, 500)),
                preface + empty_settings + b"\x00\xff\xff\x00\x08\x00\x00\x00\x01" + rng.randbytes(100),
                preface + empty_settings + b"\x00\x00\x05\x01\x05\x00\x00\x00\x01" + rng.randbytes(5),
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01" + rng.randbytes(200),
                b"",
            )
        )
        try:
            writer.write(body)
            await writer.drain()
            await asyncio.wait_for(reader.read(1 << 16), 0.2)
        except (OSError, TimeoutError):
            pass
        finally:
            writer.close()

    for start in range(0, connections, 50):
        await asyncio.gather(*(one() for _ in range(min(50, connections - start))))


async def check_afterwards(target: str) -> None:
    """Healthy, nothing open, no page held, and a proper request is answered."""
    async with grpc.aio.insecure_channel(target) as channel:
        service = health_pb2.HealthCheckRequest(service="lda.v1.LdaService")
        # A worker that was killed last may still be on its way.
        async for reply in health_pb2_grpc.HealthStub(channel).Watch(service, timeout=120):
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                break
        stub = lda_service_pb2_grpc.LdaServiceStub(channel)
        load = await stub.GetLoad(lda_service_pb2.GetLoadRequest(), timeout=30)
        deadline = time.monotonic() + 30
        while load.open_requests or load.running_sequences or load.kv_cache_usage:
            assert time.monotonic() < deadline, f"something stayed open: {load}"
            await asyncio.sleep(0.1)
            load = await stub.GetLoad(lda_service_pb2.GetLoadRequest(), timeout=30)
        request = lda_service_pb2.GenerateLDARequest(prompt=lda_service_pb2.Prompt(text="hi"))
        assert [each async for each in stub.GenerateLDA(request, timeout=30)]


async def fuzz(requests: int, seed: int, at_once: int = 64) -> collections.Counter[str]:
    """Run it; the answers by kind. Raises AssertionError with the first faults."""
    with tempfile.TemporaryDirectory() as folder:
        pair = tiny_pair(folder, num_hidden_layers=1)
        async with serving(folder, *pair, "--max-new-tokens", "6", "--max-sequences-per-request", "4") as live:
            worker = live.worker()
            assert worker is not None
            fuzzer = Fuzzer(live.target, seed)
            await asyncio.gather(
                fuzzer.run(requests, at_once), garbage(live.port, requests // 100, random.Random(seed))
            )
            await check_afterwards(live.target)
            assert live.worker() == worker, "the worker was replaced: something crashed it"
            text = live.log.read_text(errors="replace")
        assert not fuzzer.faults, f"{len(fuzzer.faults)} faults, such as: " + "\n".join(fuzzer.faults[:5])
        assert "Traceback" not in text, "the log holds a traceback:\n" + text[text.index("Traceback") :][:3000]
        return fuzzer.answers


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    answers = asyncio.run(fuzz(options.requests, options.seed))
    seconds = time.monotonic() - began
    print(f"{options.requests} requests and {options.requests // 100} connections of garbage in {seconds:.0f} s:")
    for answer, count in answers.most_common():
        print(f"  {count:8d}  {answer}")


if __name__ == "__main__":
    sys.exit(main())
