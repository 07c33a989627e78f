"""Streams of events, sync and asyncio: iterate them, leave them early, or gather them whole.

Leaving early cancels the call on the server, which frees its place at the next decoding step. The sure way is the
context manager:

    with client.generate("Hi") as stream:               async with client.generate("Hi") as stream:
        for event in stream: ...                            async for event in stream: ...

Without it, the call is cancelled when the stream object is dropped. Knows calls and events; nothing of channels and
of how requests are built.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from lda_client._errors import LdaClientError, StreamBroken, error_from_rpc
from lda_client._gather import (
    Completions,
    GenerateEventT,
    GenerateReader,
    Reader,
    ScoredText,
    TextPiece,
    is_known,
    text_piece,
)
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

if TYPE_CHECKING:
    from types import TracebackType

    from lda_client._plans import Plan

Request: TypeAlias = "pb.GenerateLDARequest | pb.GenerateBothRequest | pb.ScoreRequest"
EventT = TypeVar("EventT", bound=Message)
EventT_co = TypeVar("EventT_co", covariant=True)
ResultT = TypeVar("ResultT")


class SyncCall(Protocol[EventT_co]):
    """What we use of a sync streaming call."""

    def __iter__(self) -> Iterator[EventT_co]: ...
    def __next__(self) -> EventT_co: ...
    def cancel(self) -> bool: ...


class AsyncCall(Protocol[EventT_co]):
    """What we use of an asyncio streaming call."""

    def __aiter__(self) -> AsyncIterator[EventT_co]: ...
    def cancel(self) -> bool: ...


class _Stream(Generic[EventT, ResultT]):
    """What both kinds of stream share: the grammar, and how they end."""

    def __init__(self, plan: Plan[Any, Any], target: str) -> None:
        self._reader: Reader[EventT, ResultT] = plan.reader
        self._request: Request = plan.request
        self._target = target
        self._answered = False
        self._ended = False
        self._left = False

    @property
    def request(self) -> Request:
        """What is sent; the form of a plain string is settled once the call has begun."""
        return self._request

    @property
    def cancelled(self) -> bool:
        """Whether the stream was left before its end, so that the call was cancelled."""
        return self._left

    @property
    def score_alphas(self) -> tuple[float, ...]:
        """The alphas at which whole sequences are scored, as the caller wrote them."""
        return self._reader.score_alphas

    def _accept(self, event: EventT) -> bool:
        """Check an event against the grammar; False for one of a newer contract, to be skipped. Raises StreamBroken."""
        self._answered = True
        if not is_known(event):
            return False
        self._reader.observe(event)
        return True

    def _finish(self) -> None:
        self._ended = True
        self._reader.end()

    def _leave(self) -> None:
        self._left |= not self._ended
        self._ended = True

    def _fail(self, error: grpc.RpcError) -> LdaClientError:
        self._ended = True
        return error_from_rpc(error, self._target, answered=self._answered)

    def _require_fresh(self) -> None:
        if self._reader.begun:
            raise RuntimeError("gather() needs the whole stream, but tokens were already read from this one.")

    def _result(self) -> ResultT:
        self._reader.end()
        return self._reader.result()


class SyncStream(_Stream[EventT, ResultT], Iterator[EventT]):
    """Iterator and context manager over the events of one call, which is under way.

    Leaving early, by `close()`, by the end of `with` or by dropping the stream, cancels the call on the server. Errors
    of the call are raised by iteration, as an `LdaClientError`.
    """

    def __init__(self, call: SyncCall[EventT], plan: Plan[Any, Any], target: str) -> None:
        super().__init__(plan, target)
        self._call = call
        self._cancel = weakref.finalize(self, call.cancel)
        self._cancel.atexit = False

    def __next__(self) -> EventT:
        while (event := self._receive()) is not None:
            try:
                if self._accept(event):
                    return event
            except StreamBroken:
                self.close()
                raise
        raise StopIteration

    def _receive(self) -> EventT | None:
        """The next event; None at the end."""
        if self._ended:
            return None
        try:
            event = next(self._call, None)
        except grpc.RpcError as error:
            if self._ended:  # closed from another thread while we waited
                return None
            raise self._fail(error) from error
        if event is None:
            self._finish()
        return event

    def close(self) -> None:
        """Cancel the call on the server if it is still under way; iteration then simply ends. May be called twice."""
        self._leave()
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def gather(self) -> ResultT:
        """Read the stream to its end and return what it adds up to.

        Raises:
            RuntimeError: if tokens were already read from this stream.
            LdaClientError: if the call fails; `StreamBroken` if it was closed before its end.
        """
        self._require_fresh()
        with self:
            for event in self:
                self._reader.add(event)
        return self._result()


class AsyncStream(_Stream[EventT, ResultT], AsyncIterator[EventT]):
    """Async iterator and async context manager over the events of one call.

    The call begins at `async with` or at the first event. Leaving `async with`, `close()` and the cancellation of the
    reading task cancel the call on the server. A bare `break` out of `async for` does so when the stream object is
    dropped, which is at once if no name holds it: `async with` is the sure way. Errors of the call are raised by
    iteration, as an `LdaClientError`.
    """

    def __init__(self, begin: Callable[[], Awaitable[AsyncCall[EventT]]], plan: Plan[Any, Any], target: str) -> None:
        super().__init__(plan, target)
        self._begin = begin
        self._events: AsyncIterator[EventT] | None = None
        self._cancel: Callable[[], object] = _nothing

    async def _open(self) -> AsyncIterator[EventT]:
        if self._events is None:
            call = await self._begin()
            self._events = aiter(call)
            self._cancel = finalizer = weakref.finalize(self, _cancel_in_loop, asyncio.get_running_loop(), call)
            finalizer.atexit = False
        return self._events

    async def __anext__(self) -> EventT:
        while (event := await self._receive()) is not None:
            try:
                if self._accept(event):
                    return event
            except StreamBroken:
                await self.close()
                raise
        raise StopAsyncIteration

    async def _receive(self) -> EventT | None:
        """The next event; None at the end."""
        if self._ended:
            return None
        try:
            event = await anext(await self._open(), None)
        except grpc.RpcError as error:
            raise self._fail(error) from error
        except asyncio.CancelledError:
            if self._ended and not _being_cancelled():  # closed by another task while we waited
                return None
            await self.close()
            raise
        if event is None:
            self._finish()
        return event

    async def close(self) -> None:
        """Cancel the call on the server if it is still under way; iteration then simply ends. May be called twice."""
        self._leave()
        self._cancel()

    aclose = close

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def gather(self) -> ResultT:
        """Read the stream to its end and return what it adds up to.

        Raises:
            RuntimeError: if tokens were already read from this stream.
            LdaClientError: if the call fails; `StreamBroken` if it was closed before its end.
        """
        self._require_fresh()
        async with self:
            async for event in self:
                self._reader.add(event)
        return self._result()


def _nothing() -> None:
    """There is no call to cancel yet."""


def _cancel_in_loop(loop: asyncio.AbstractEventLoop, call: AsyncCall[object]) -> None:
    """Cancel from wherever the stream was dropped: the collector runs in any thread, grpc.aio in one alone."""
    if asyncio._get_running_loop() is loop:
        call.cancel()
        return
    with contextlib.suppress(RuntimeError):  # the loop is closed, and the call with it
        loop.call_soon_threadsafe(call.cancel)


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Generation(_Stream[GenerateEventT, Completions]):
    """What the sync and the asyncio stream of a generation share."""

    _reader: GenerateReader

    @property
    def started(self) -> pb.Started | None:
        """The first event: generation id, seed and alpha in force; None until it has arrived."""
        return self._reader.started

    @property
    def generation_id(self) -> str | None:
        """The id under which the server logs this generation; None until `started` has arrived."""
        return self.started.generation_id if self.started else None


class GenerateStream(_Generation[GenerateEventT], SyncStream[GenerateEventT, Completions]):
    __doc__ = f"The events of `generate` or `generate_both`. {SyncStream.__doc__}"

    def text(self) -> Iterator[TextPiece]:
        """The texts alone, as (sequence_index, role, text), in the order of arrival."""
        return (piece for event in self if (piece := text_piece(event)))


class AsyncGenerateStream(_Generation[GenerateEventT], AsyncStream[GenerateEventT, Completions]):
    __doc__ = f"The events of `generate` or `generate_both`. {AsyncStream.__doc__}"

    async def text(self) -> AsyncIterator[TextPiece]:
        """The texts alone, as (sequence_index, role, text), in the order of arrival."""
        async for event in self:
            if piece := text_piece(event):
                yield piece


class ScoreStream(SyncStream[pb.ScoreResponse, ScoredText]):
    __doc__ = f"The blocks of `score`. {SyncStream.__doc__}"


class AsyncScoreStream(AsyncStream[pb.ScoreResponse, ScoredText]):
    __doc__ = f"The blocks of `score`. {AsyncStream.__doc__}"
