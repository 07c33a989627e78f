"""A server that plays the scripts of the cases: what a newer, a broken or a flaky server might send.

    python script_server.py       prints its port, serves until its input ends

It knows no messages on its way in and sends bytes. The bearer token names the case, and tells the runs of it apart:
`Bearer CASE.RUN`. A script is a list of steps:

    {started: {...}}    a response message in proto3 JSON; "{attempt}" in a text becomes the number of the attempt
    {..., $append: {15: {1: hi}}}
                        and further fields after it, by number: fields that no client knows
    $hold               silence until the call ends
    $status: {...}      an error: code, message, and the `google.rpc` details of `_status`
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any

import cases
import grpc
from google.protobuf import any_pb2, json_format
from google.rpc import error_details_pb2, status_pb2

MESSAGE_BYTES_MAX = 64 << 20
DETAILS_KEY = "grpc-status-details-bin"


class Player(grpc.GenericRpcHandler):
    """Answers every method with the script of the case that the token names."""

    def __init__(self) -> None:
        self._cases = {case.name: case for case in cases.load() if case.attempts}
        self._attempts: Counter[str] = Counter()

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """One handler for all: on the wire, a unary answer is a stream of one message."""
        return grpc.unary_stream_rpc_method_handler(self._play)

    async def _play(self, request: bytes, context: Any) -> Any:
        token = dict(context.invocation_metadata()).get("authorization", "").removeprefix("Bearer ")
        case = self._cases.get(token.partition(".")[0])
        if case is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"the token {token!r} names no case with a script")
            return
        self._attempts[token] += 1
        attempt = self._attempts[token]
        for step in case.attempts[min(attempt, len(case.attempts)) - 1]:
            step = json.loads(json.dumps(step).replace("{attempt}", str(attempt)))
            if step == "$hold":
                await asyncio.Event().wait()
            elif "$status" in step:
                await _fail(context, step["$status"])
            else:
                yield _bytes(step, cases.RESPONSES[case.verb])


def _bytes(step: dict[str, Any], kind: Any) -> bytes:
    known = json_format.ParseDict(cases.message_of(step), kind())
    return bytes(known.SerializeToString()) + _fields(step.get("$append", {}))


def _fields(values: dict[str, Any]) -> bytes:
    """Fields by number: an int as a varint, a text as it is, a mapping as a message."""
    return b"".join(_field(int(number), value) for number, value in values.items())


def _field(number: int, value: Any) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = _fields(value) if isinstance(value, dict) else value.encode()
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


async def _fail(context: Any, status: dict[str, Any]) -> None:
    code, message = grpc.StatusCode[status["code"]], status.get("message", "as the script says")
    packed = b"\xff\xff" if status.get("garbage") else _status(code, message, status).SerializeToString()
    await context.abort(code, message, ((DETAILS_KEY, packed),) if status.keys() - {"code", "message"} else ())


def _status(code: grpc.StatusCode, message: str, status: dict[str, Any]) -> status_pb2.Status:
    """With details: `unknown` (of a type nobody knows), `reason`, `domain`, `metadata`, `violations`, `retryAfter`."""
    result = status_pb2.Status(code=code.value[0], message=message)
    if "unknown" in status:
        result.details.append(any_pb2.Any(type_url="type.googleapis.com/lda.v9.Newer", value=b"\x08\x01"))
    if "reason" in status:
        named = {"domain": "lda.v1", **{key: status[key] for key in ("reason", "domain", "metadata") if key in status}}
        _pack(result, error_details_pb2.ErrorInfo(**named))
    if "violations" in status:
        _pack(result, error_details_pb2.BadRequest(field_violations=status["violations"]))
    if "retryAfter" in status:
        _pack(result, json_format.ParseDict({"retryDelay": status["retryAfter"]}, error_details_pb2.RetryInfo()))
    return result


def _pack(status: status_pb2.Status, detail: Any) -> None:
    status.details.add().Pack(detail)


async def main() -> None:
    """Serve until standard input ends, which it does with the runner."""
    size = [("grpc.max_send_message_length", MESSAGE_BYTES_MAX), ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
    server = grpc.aio.server(handlers=(Player(),), options=size)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"scripted": port}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
