"""What happens around every call: its request id, the check of its message, and the shape of its errors.

Knows calls and messages in general; nothing of what a method does. A handler is wrapped in a real coroutine or async
generator, since grpc.aio inspects the kind of function. Calls with a request stream (reflection) pass through.
"""

from __future__ import annotations

import logging
import re
import secrets
from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import protovalidate
from google.protobuf.message import DecodeError

from lda_service.errors import InternalError, InvalidRequest, LdaError
from lda_service.rpc.status import REQUEST_ID_KEY, abort
from lda_service.telemetry import log_field

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]

# Set for each call by RequestIdInterceptor; every call runs in a task of its own.
request_id = log_field("request_id")

ACCEPTABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = logging.getLogger(__name__)


class Layer(ABC):
    """Something that happens around every call with one request message."""

    def found(self, handler: Handler | None, method: str) -> Handler | None:
        """The handler of a method was looked up; None if there is none. Returns the one to use."""
        return handler

    @abstractmethod
    def around(self, request: Any, context: Context) -> AbstractAsyncContextManager[None]:
        """What happens before and after a call."""


class LayersInterceptor(grpc.aio.ServerInterceptor):
    """Runs every handler inside layers, the first outermost.

    One generator for all of them: every message of a stream passes through each generator that there is.
    """

    def __init__(self, *layers: Layer) -> None:
        self._layers = layers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler that was found, if any."""
        handler = await continuation(handler_call_details)
        for layer in self._layers:
            handler = layer.found(handler, handler_call_details.method)
        if handler is None or handler.request_streaming:
            return handler
        return self._stream(handler) if handler.response_streaming else self._unary(handler)

    def _stream(self, handler: Handler) -> Handler:
        inner: Any = handler.unary_stream

        async def respond(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._around(request, context), aclosing(inner(request, context)) as responses:
                async for response in responses:
                    yield response

        return grpc.unary_stream_rpc_method_handler(respond, handler.request_deserializer, handler.response_serializer)

    def _unary(self, handler: Handler) -> Handler:
        inner: Any = handler.unary_unary

        async def respond(request: Any, context: Context) -> Any:
            async with self._around(request, context):
                return await inner(request, context)

        return grpc.unary_unary_rpc_method_handler(respond, handler.request_deserializer, handler.response_serializer)

    @asynccontextmanager
    async def _around(self, request: Any, context: Context) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for layer in self._layers:
                await stack.enter_async_context(layer.around(request, context))
            yield


class RequestIdInterceptor(grpc.aio.ServerInterceptor):
    """Takes the caller's `x-request-id` or makes one, for everything that runs in this call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Set the id, for the interceptors after this one too."""
        request_id.set(_caller_id(handler_call_details.invocation_metadata or ()) or f"r-{secrets.token_hex(8)}")
        return await continuation(handler_call_details)


class FaultLayer(Layer):
    """Sends the request id at the end, and turns every exception into a status.

    The text of an unexpected exception stays in the log.
    """

    @asynccontextmanager
    async def around(self, request: Any, context: Context) -> AsyncIterator[None]:
        """Cancellation is not an exception here: it belongs to gRPC and passes."""
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id.get()),))
        try:
            yield
        except grpc.aio.AbortError:
            raise
        except LdaError as error:
            log.info("request %s ended: %s %s: %s", request_id.get(), error.code, error.reason, error.message)
            await abort(context, error, request_id.get())
        except Exception:
            log.exception("request %s failed", request_id.get())
            await abort(context, InternalError("unexpected"), request_id.get())


class ValidationLayer(Layer):
    """Checks the message against the rules of its .proto, and names every field at fault."""

    def found(self, handler: Handler | None, method: str) -> Handler | None:
        """Bytes that are no message are the caller's fault too; gRPC would call it the server's."""
        if handler is None or handler.request_streaming:
            return handler
        return handler._replace(request_deserializer=_lenient(handler.request_deserializer))  # type: ignore[attr-defined, no-any-return]

    @asynccontextmanager
    async def around(self, request: Any, context: Context) -> AsyncIterator[None]:
        """Refuse before any work is done."""
        if isinstance(request, DecodeError):
            raise InvalidRequest("The message cannot be read: its bytes are not those of this method's request.")
        violations = check(request)
        if violations:
            error = InvalidRequest(sentence(violations))
            log.info("request %s refused: %s", request_id.get(), error.message)
            await abort(context, error, request_id.get(), violations)
        yield


def _lenient(deserialize: Any) -> Callable[[bytes], Any]:
    """The message, or the reason why there is none."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return error

    return read


def check(request: Any) -> list[tuple[str, str]]:
    """(field path, what is allowed) of every field that breaks a rule; the path is empty for a rule over several."""
    allowed: dict[str, list[str]] = {}
    for violation in protovalidate.collect_violations(request):
        field = violation.proto.field
        path = ".".join(map(_path_element, field.elements)) if field else ""
        allowed.setdefault(path, []).append(_plain(violation.proto.message or "is not allowed"))
    return [(path, _conjunction(rules)) for path, rules in allowed.items()]


def sentence(violations: Sequence[tuple[str, str]]) -> str:
    """The first fault in words, a field's own before a rule over several."""
    path, allowed = next((each for each in violations if each[0]), violations[0])
    colon = "" if not path or allowed.startswith(("must ", "is ")) else ":"
    others = len(violations) - 1
    rest = f" ({others} more {'field is' if others == 1 else 'fields are'} at fault.)" if others else ""
    return f"{path}{colon} {allowed}.{rest}".strip()


def _path_element(element: Any) -> str:
    subscript = element.subscript
    return f"{element.field_name}[{subscript.value}]" if subscript is not None else str(element.field_name)


def _plain(message: str) -> str:
    """The sentence of protovalidate, shorter."""
    message = re.sub(r"greater than or equal to (\S+) and less than or equal to (\S+)", r"between \1 and \2", message)
    message = re.sub(r"greater than (\S+) and less than or equal to (\S+)", r"above \1 and at most \2", message)
    message = message.replace("less than or equal to", "at most").replace("greater than or equal to", "at least")
    message = message.replace("field is required in oneof", "form is required")
    return message.removeprefix("repeated value ").removeprefix("value ")


def _conjunction(rules: list[str]) -> str:
    """["must be between 0 and 1", "must be finite"] becomes "must be finite and between 0 and 1"."""
    rules = sorted(rules, key=len)
    return " and ".join([rules[0], *(rule.removeprefix("must be ") for rule in rules[1:])])


def _caller_id(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """An id of the caller that is safe to log and to send back."""
    ids = (value for key, value in metadata if key == REQUEST_ID_KEY and isinstance(value, str))
    return next((each for each in ids if ACCEPTABLE_ID.fullmatch(each)), None)
