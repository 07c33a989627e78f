"""Who calls, and whether they may: tokens and client certificates against the scope that a method needs.

Decides before a message is read, so that no answer depends on what was sent, or on what is loaded. Knows methods by
name only; health checks are open, since a kubelet cannot show a token.
"""

from __future__ import annotations

import ipaddress
import logging
from contextlib import aclosing
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from lda_service.errors import AccessError, PermissionDenied, Unauthenticated
from lda_service.rpc.interceptors import request_id
from lda_service.rpc.status import abort
from lda_service.rpc.tokens import TokenFile
from lda_service.rpc.web_tokens import WebTokens, printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
    from typing import Never

    from lda_service.config import AccessConfig
    from lda_service.rpc.tokens import Grant

    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
    Admit = Callable[[Context], Awaitable[None]]

# The name of an authenticated caller; set for each call where callers are authenticated.
caller_name: ContextVar[str] = ContextVar("caller_name", default="")

OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
# What a method needs; None is any token. What is not listed needs `admin`, whether it exists or not.
SCOPE_OF = {
    "/lda.v1.LdaService/GenerateLDA": "generate",
    "/lda.v1.LdaService/GenerateBoth": "generate",
    "/lda.v1.LdaService/Score": "score",
    "/lda.v1.LdaService/TokenizerCompat": None,
    "/lda.v1.LdaService/GetModelPair": None,
    "/lda.v1.LdaService/GetLoad": None,
    "/lda.v1.CompletionService/CompleteLDA": "generate",
    "/lda.v1.CompletionService/CompleteLDABatch": "generate",
    "/lda.v1.CompletionService/CompleteBoth": "generate",
    "/lda.v1.CompletionService/CheckTokenizers": None,
}
ADMIN = "admin"

NO_TOKEN = "Send a valid token, as metadata `authorization: Bearer TOKEN`."
WRONG_CERTIFICATE = "The client certificate is not one of those that may call."

EXPOSED = """
********************************************************************************
*  NO AUTHENTICATION ON A PUBLIC ADDRESS. WHOEVER REACHES                      *
*  {address:<74}  *
*  MAY USE THE MODELS, SEE WHAT THEY ARE, AND END THE GENERATIONS OF OTHERS.   *
*  Set TOKENS_FILE, JWT_KEY_FILE or TLS_CLIENT_CA, or HOST=127.0.0.1.          *
********************************************************************************"""
READABLE = "tokens cross the network readable: %s is not loopback and there is no TLS; set TLS_CERT and TLS_KEY"

log = logging.getLogger(__name__)


def caller_of(context: Context) -> str:
    """The authenticated name of the caller, or the address it calls from."""
    # "ipv4:127.0.0.1:50123", "ipv6:%5B::1%5D:50123", "unix:": a port is no identity.
    return caller_name.get() or str(context.peer()).rpartition(":")[0]


class TokenSource(Protocol):
    """Knows some tokens."""

    def find(self, token: str) -> Grant | None:
        """What a token allows; None if it is not known here. Raises `Unauthenticated` for an expired one."""


def interceptors(access: AccessConfig, on_refusal: Callable[[str], None]) -> tuple[AccessInterceptor, ...]:
    """What stands before the methods: nothing if nobody has to say who they are.

    Args:
        access: settings.
        on_refusal: told the reason of every refusal.

    Raises:
        ConfigError: a file of tokens or keys cannot be used.
    """
    sources: list[TokenSource] = []
    if access.tokens_file is not None:
        sources.append(TokenFile(access.tokens_file))
    if access.jwt_key_file is not None and access.jwt_audience is not None:
        sources.append(WebTokens(access.jwt_key_file, access.jwt_audience, access.jwt_issuer))
    certificates = Certificates(access.tls_client_san) if access.tls_client_ca else None
    return (AccessInterceptor(sources, certificates, on_refusal),) if sources or certificates else ()


def tell_exposure(access: AccessConfig, host: str, port: int) -> None:
    """Say in the log what a listening server leaves open to others than this machine."""
    if _is_loopback(host):
        return
    if not access.authenticates:
        log.warning("%s", EXPOSED.format(address=f"{host}:{port}"))
    elif access.takes_tokens and access.tls_cert is None:
        log.warning(READABLE, f"{host}:{port}")


class Certificates:
    """Names callers by their certificates; TLS has verified these.

    Args:
        allowed: the names (DNS or URI) of which a certificate must carry one; empty allows all.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = frozenset(allowed)

    def name(self, context: Context) -> str:
        """What a caller's certificate calls it.

        Raises:
            PermissionDenied: none of its names is allowed.
        """
        properties = context.auth_context()
        alternatives = _texts(properties, "peer_uri") + _texts(properties, "peer_dns")
        if self._allowed and self._allowed.isdisjoint(alternatives):
            raise PermissionDenied(WRONG_CERTIFICATE)
        return printable(next(iter(alternatives + _texts(properties, "x509_common_name")), ""))


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a right to their method, and names the caller of the others.

    Args:
        sources: who knows tokens; empty if none are needed.
        certificates: who knows client certificates; None if there are none.
        on_refusal: told the reason of every refusal.
    """

    def __init__(
        self, sources: Sequence[TokenSource], certificates: Certificates | None, on_refusal: Callable[[str], None]
    ) -> None:
        self._sources, self._certificates, self._on_refusal = sources, certificates, on_refusal

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Check the token now, and the certificate as soon as the call has a context."""
        method = _text(handler_call_details.method)
        if method in OPEN_METHODS:
            return await continuation(handler_call_details)
        try:
            if self._sources:
                caller_name.set(self._by_token(method, handler_call_details.invocation_metadata or ()))
        except AccessError as error:
            return self._refusal(error)
        except Exception:
            log.exception("request %s: its token could not be checked", request_id.get())
            return self._refusal(Unauthenticated(NO_TOKEN))
        handler = await continuation(handler_call_details)
        return _guarded(handler, self._admit) if self._certificates else handler

    def _by_token(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        token = _bearer(metadata)
        grant = next((found for source in self._sources if (found := source.find(token))), None) if token else None
        if grant is None:
            raise Unauthenticated(NO_TOKEN)
        scope = SCOPE_OF.get(method, ADMIN)
        if scope is not None and scope not in grant.scopes:
            raise PermissionDenied(
                f"The token does not allow this; it needs the scope {scope}.", metadata={"scope": scope}
            )
        return grant.name

    async def _admit(self, context: Context) -> None:
        """Look at the certificate. A token, if there is one, has named the caller already."""
        try:
            name = self._certificates.name(context) if self._certificates else ""
        except AccessError as error:
            await self._refuse(context, error)
        if not self._sources:
            caller_name.set(name)

    def _refusal(self, error: AccessError) -> Handler:
        """A handler for any kind of method. As one of a stream of requests it runs before a message has arrived."""

        async def refuse(_: Any, context: Context) -> None:
            await self._refuse(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    async def _refuse(self, context: Context, error: AccessError) -> Never:
        log.info("request %s from %s refused: %s", request_id.get(), context.peer(), error.message)
        self._on_refusal(error.reason)
        await abort(context, error, request_id.get())


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The token of a call; None if there is none, or more than one."""
    values = [_text(value) for key, value in metadata if key == "authorization"]
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _guarded(handler: Handler | None, admit: Admit) -> Handler:
    """A handler that is entered once the caller is admitted; till then its message stays unread bytes."""
    if handler is None or handler.request_streaming:
        return _guarded_stream(handler, admit)
    inner: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
    read: Callable[[bytes], Any] = handler.request_deserializer or bytes

    async def stream(message: bytes, context: Context) -> AsyncIterator[Any]:
        await admit(context)
        async with aclosing(inner(read(message), context)) as responses:
            async for response in responses:
                yield response

    async def unary(message: bytes, context: Context) -> Any:
        await admit(context)
        return await inner(read(message), context)

    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
    return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)


def _guarded_stream(handler: Handler | None, admit: Admit) -> Handler:
    """The same for a stream of requests, and for a method that does not exist."""

    async def stream(messages: Any, context: Context) -> AsyncIterator[Any]:
        await admit(context)
        if handler is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        inner: Any = handler.stream_stream
        async with aclosing(inner(messages, context)) as responses:
            async for response in responses:
                yield response

    deserialize, serialize = (handler.request_deserializer, handler.response_serializer) if handler else (None, None)
    return grpc.stream_stream_rpc_method_handler(stream, deserialize, serialize)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _texts(properties: Any, key: str) -> list[str]:
    return [_text(value) for value in properties.get(key, ())]


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
