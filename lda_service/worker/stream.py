"""The server's view of one request in the worker: a bounded queue of its events.

Lives on the event loop. Knows when a request has ended and what a slow reader costs; nothing of pipes or processes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from lda_service.engine.request import RequestFailed, SequenceDelta
from lda_service.errors import SlowConsumer
from lda_service.worker.messages import ends_sequence, sequences_of
from lda_service.worker.pending import PendingDelta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from lda_service.engine.request import Event, GenerationRequest, Role, ScoreRequest, TokenRecord
    from lda_service.errors import LdaError


EVENTS_BEHIND = 32  # waiting events from which a reader counts as behind
MERGED_TOKENS_MAX = 256


def weight(tokens: Sequence[TokenRecord]) -> int:
    """What tokens cost in memory, in plain tokens: each alternative that comes with one is about as large."""
    total = len(tokens)
    for token in tokens:
        if token.diagnostics is not None:
            total += 1 + len(token.diagnostics.candidates)
    return total


class EventStream:
    """Async iterator over the events of one request, and the context manager that gives its place back.

    It ends by itself when every sequence has ended, and raises the error that ended it otherwise.
    """

    def __init__(
        self,
        request: GenerationRequest | ScoreRequest,
        max_buffered_tokens: int,
        release: Callable[[EventStream], None],
        on_failure: Callable[[], None],
    ) -> None:
        self.request_id = request.request_id
        self._max_buffered_tokens = max_buffered_tokens
        self._release = release  # called once, when the worker owes nothing more or is to stop
        self._on_failure = on_failure  # called at once when the stream fails, whether or not anybody reads
        self._sequences_open = sequences_of(request)  # counted down by push
        self._events: deque[Event | PendingDelta] = deque()  # filled by push, emptied by the reader
        # Of each sequence, what in _events may still grow; empty while the reader keeps up.
        self._tails: dict[tuple[Role, int], PendingDelta] = {}
        self._buffered_tokens = 0  # weight of what is in _events
        self._error: LdaError | None = None  # what ended the stream before its time
        self._closed = False  # set once by close
        # Done when there is something to read or an end to see; set by the reader while it waits. One reader and one
        # future are all there is: a stream waits before every token.
        self._news: asyncio.Future[None] | None = None

    @property
    def settled(self) -> bool:
        """Whether the worker has sent everything it owes, so that there is nothing to cancel."""
        return not self._sequences_open

    @property
    def exhausted(self) -> bool:
        """Whether everything was read and nothing will follow."""
        return self.settled and not self._events and self._error is None

    @property
    def error(self) -> LdaError | None:
        """What ended the stream before its time, whether or not anybody has read that far."""
        return self._error

    def push(self, event: Event) -> None:
        """Take an event from the worker."""
        if isinstance(event, RequestFailed):
            self._sequences_open = 0
            self.fail(event.error)
            return
        self._sequences_open -= ends_sequence(event)
        if isinstance(event, SequenceDelta):
            self._push_delta(event)
        else:
            self._events.append(event)
        self._wake()
        if self._buffered_tokens > self._max_buffered_tokens:
            self._end_slow_reader()
        elif self.settled:
            self._release(self)

    def _push_delta(self, delta: SequenceDelta) -> None:
        """Once a reader is behind, new tokens join those of their sequence that wait already."""
        self._buffered_tokens += weight(delta.tokens)
        key = (delta.role, delta.sequence_index)
        if len(self._events) < EVENTS_BEHIND:
            if self._tails:
                self._tails.pop(key, None)  # what comes later must stand behind this
            self._events.append(delta)
            return
        tail = self._tails.get(key)
        if tail is None or len(tail.tokens) >= MERGED_TOKENS_MAX:
            tail = self._tails[key] = PendingDelta(delta)
            self._events.append(tail)
        tail.add(delta)

    def fail(self, error: LdaError) -> None:
        """End the stream with an error; what was delivered before it may still be read."""
        if not self._closed and self._error is None:
            self._error = error
            self._wake()
            self._release(self)
            self._on_failure()

    def close(self) -> None:
        """Nobody reads any more: the worker is told to stop, if it has not. May be called twice."""
        if not self._closed:
            self._closed = True
            self._release(self)

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event, or None if none came in time. Not to be called when the stream is exhausted.

        Raises:
            LdaError: the request failed, or the server ended it.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if not await self._wait(timeout_s):
                return None
        event = self._events.popleft()
        if isinstance(event, PendingDelta):
            key = (event.first.role, event.first.sequence_index)
            if self._tails.get(key) is event:
                del self._tails[key]
            event = event.merged()
        if isinstance(event, SequenceDelta):
            self._buffered_tokens -= weight(event.tokens)
        return event

    async def _wait(self, timeout_s: float | None) -> bool:
        """Whether there is news; False if none came in time."""
        self._news = asyncio.get_running_loop().create_future()
        try:
            if timeout_s is None:  # the usual case: no timer for it
                await self._news
                return True
            async with asyncio.timeout(timeout_s):
                await self._news
        except TimeoutError:
            return False
        finally:
            self._news = None
        return True

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _end_slow_reader(self) -> None:
        """Drop what is buffered and stop: the memory of a stalled reader is bounded, whatever it asked for."""
        buffered = self._buffered_tokens
        self._events.clear()
        self._tails.clear()
        self.fail(
            SlowConsumer(
                f"The stream was ended because {buffered} tokens were waiting to be read; read faster, or ask for "
                "fewer sequences per call.",
                metadata={"buffered_tokens": str(buffered)},
            )
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self.exhausted:
            raise StopAsyncIteration
        event = await self.next()
        assert event is not None, "without a time limit there is always an event"
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
