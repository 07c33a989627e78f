"""Errors to `google.rpc.Status`: the code, the machine-readable reason, and details small enough to arrive.

Knows the error classes and the details of google.rpc. Does not know when an error happens.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2
from grpc_status import rpc_status

from lda_service.errors import CallerLimit, LdaError, QueueFull, Refused, WorkerDied
from lda_service.rpc.convert import duration

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Never

    from google.protobuf.message import Message

DOMAIN = "lda.v1"
INTERNAL_TEXT = "The server failed on this request; its log holds more under the request id."
RETRY_DELAY_S = 1.0
REQUEST_ID_KEY = "x-request-id"

# gRPC drops a status whose headers pass 8 KiB. Details travel in base64 and the message travels twice.
DETAILS_BYTES_MAX = 4096
SENTENCE_CHARS_MAX = 500
METADATA_CHARS_MAX = 200


def status_of(error: LdaError, request_id: str = "", violations: Sequence[tuple[str, str]] = ()) -> status_pb2.Status:
    """The status of an error.

    Args:
        error: what happened. The text of an internal error is replaced: it stays in the log.
        request_id: under which the log can be searched.
        violations: (field path, what is allowed) of every field at fault; by default the error's own field.
    """
    if error.code == "INTERNAL":
        error = LdaError(INTERNAL_TEXT, metadata={"request_id": request_id})
    sentence = _cut(error.message, SENTENCE_CHARS_MAX)
    status = status_pb2.Status(code=grpc.StatusCode[error.code].value[0], message=sentence)
    for detail in _details(error, sentence):
        _pack(status, detail)
    if not violations and error.field is not None:
        violations = [(error.field, sentence)]
    if violations:
        _pack(status, _bad_request(violations, DETAILS_BYTES_MAX - status.ByteSize()))
    return status


async def abort(
    context: grpc.aio.ServicerContext[Any, Any],
    error: LdaError,
    request_id: str,
    violations: Sequence[tuple[str, str]] = (),
) -> Never:
    """End the call with the status of an error. Raises gRPC's own exception, which must not be swallowed.

    A call whose caller has gone in the meantime ends as a cancelled one.
    """
    status = rpc_status.to_status(status_of(error, request_id, violations))
    trailing = (*status.trailing_metadata, (REQUEST_ID_KEY, request_id))
    try:
        await context.abort(status.code, status.details, trailing)
    except grpc.aio.InternalError as gone:
        raise asyncio.CancelledError from gone


def _details(error: LdaError, sentence: str) -> list[Message]:
    metadata = {key: _cut(value, METADATA_CHARS_MAX) for key, value in error.metadata.items()}
    details: list[Message] = [details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    retry_s = error.retry_after_s
    if retry_s is None and isinstance(error, Refused | WorkerDied):
        retry_s = RETRY_DELAY_S
    if retry_s is not None:
        details.append(details_pb2.RetryInfo(retry_delay=duration(retry_s)))
    if isinstance(error, QueueFull | CallerLimit):
        subject = "queue" if isinstance(error, QueueFull) else "caller"
        quota = details_pb2.QuotaFailure.Violation(subject=subject, description=sentence)
        details.append(details_pb2.QuotaFailure(violations=[quota]))
    if error.code == "FAILED_PRECONDITION":
        violation = details_pb2.PreconditionFailure.Violation(type=error.reason, subject="pair", description=sentence)
        details.append(details_pb2.PreconditionFailure(violations=[violation]))
    return details


def _bad_request(violations: Sequence[tuple[str, str]], bytes_max: int) -> Any:
    """As many violations as fit."""
    bad_request = details_pb2.BadRequest()
    for field, description in violations:
        bad_request.field_violations.add(
            field=_cut(field, METADATA_CHARS_MAX), description=_cut(description, SENTENCE_CHARS_MAX)
        )
        if bad_request.ByteSize() > bytes_max:
            del bad_request.field_violations[-1]
            break
    return bad_request


def _pack(status: status_pb2.Status, detail: Message) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else text[: chars_max - 3] + "..."
