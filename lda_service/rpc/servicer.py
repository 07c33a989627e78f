"""The methods of lda.v1.LdaService.

Each turns a message into a request of the worker and the worker's events into messages. Knows the order of a stream:
headers and `started` on admission and not before, so that a refusal can be retried elsewhere; then deltas; then the end
of every sequence. Raises `LdaError`s; interceptors make statuses of them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc

from lda_service.engine.request import Admitted, ScoreBlock, SequenceDelta, SequenceFinished
from lda_service.errors import Draining, LdaError, Loading
from lda_service.rpc import convert
from lda_service.rpc.coalesce import EventCoalescer
from lda_service.rpc.interceptors import request_id
from lda_service.rpc.status import REQUEST_ID_KEY
from lda_service.worker.client import WorkerState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    import grpc

    from lda_service.config import EngineConfig
    from lda_service.engine.request import GenerationRequest, ScoreRequest
    from lda_service.pair_info import PairInfo
    from lda_service.rpc.convert import Prompter
    from lda_service.worker.client import WorkerClient
    from lda_service.worker.stream import EventStream

    Context = grpc.aio.ServicerContext[Any, Any]

_Message = TypeVar("_Message")
_Request = TypeVar("_Request")

GENERATION_ID_KEY = "x-generation-id"

log = logging.getLogger(__name__)


class LdaServicer(lda_service_pb2_grpc.LdaServiceServicer):
    """Serves one worker.

    Args:
        worker: owns the models.
        limits: what a request may ask of this server.
    """

    def __init__(self, worker: WorkerClient, limits: EngineConfig) -> None:
        self._worker = worker
        self._limits = limits
        self.prompter: Prompter | None = None  # set by the server when the tokenizer is loaded
        self.draining = False  # set by the server when it stops taking work
        # One thread: tokenizers may not be used from two at once, and a long text must not hold up the loop.
        self._rendering = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")

    async def GenerateLDA(  # noqa: N802
        self, request: pb.GenerateLDARequest, context: Context
    ) -> AsyncIterator[pb.GenerateLDAResponse]:
        """Samples from the amplified distribution."""
        generation = await self._render(convert.generate_lda, request)
        async with aclosing(self._generate(generation, request.output, context)) as parts:
            async for part in parts:
                yield pb.GenerateLDAResponse(**part)

    async def GenerateBoth(  # noqa: N802
        self, request: pb.GenerateBothRequest, context: Context
    ) -> AsyncIterator[pb.GenerateBothResponse]:
        """Samples from each model on its own."""
        generation = await self._render(convert.generate_both, request)
        async with aclosing(self._generate(generation, request.output, context)) as parts:
            async for part in parts:
                yield pb.GenerateBothResponse(**part)

    async def Score(  # noqa: N802
        self, request: pb.ScoreRequest, context: Context
    ) -> AsyncIterator[pb.ScoreResponse]:
        """Teacher-forces a text."""
        scoring = await self._render(convert.score, request)
        with self._open(scoring, context) as stream:
            async for event in stream:
                if isinstance(event, Admitted):
                    await _send_headers(scoring, context)
                elif isinstance(event, ScoreBlock):
                    yield convert.score_block(event, scoring)

    async def TokenizerCompat(  # noqa: N802
        self, request: pb.TokenizerCompatRequest, context: Context
    ) -> pb.TokenizerCompatResponse:
        """The vocabulary report of the loaded pair."""
        return convert.compatibility(self._pair().compatibility)

    async def GetModelPair(  # noqa: N802
        self, request: pb.GetModelPairRequest, context: Context
    ) -> pb.GetModelPairResponse:
        """What is loaded."""
        return convert.model_pair(self._pair(), self._limits)

    def _pair(self) -> PairInfo:
        if self._worker.pair is None:
            raise _loading()
        return self._worker.pair

    async def _render(
        self, make: Callable[[_Message, str, Prompter, EngineConfig], _Request], message: _Message
    ) -> _Request:
        """The worker's request for a message, under a fresh id."""
        if self.draining:
            raise Draining("The server is shutting down; another one may serve this.")
        if self.prompter is None or self._worker.state is not WorkerState.READY:
            raise _loading()
        generation_id = f"g-{secrets.token_hex(8)}"
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._rendering, make, message, generation_id, self.prompter, self._limits)

    @contextmanager
    def _open(self, request: GenerationRequest | ScoreRequest, context: Context) -> Iterator[EventStream]:
        """The worker's events for a request; the worker stops when the call ends, however it ends."""
        log.info("generation %s submitted by request %s", request.request_id, request_id.get())
        begun, outcome = time.perf_counter(), "cancelled"
        try:
            with self._worker.stream(request) as stream:
                # A handler that is stuck in a write is not resumed when its call ends: this callback is called.
                close: Any = lambda _: stream.close()  # noqa: E731
                context.add_done_callback(close)
                yield stream
            outcome = "complete"
        except Exception as error:
            outcome = error.reason if isinstance(error, LdaError) else "failed"
            raise
        finally:
            log.info("generation %s %s after %.3f s", request.request_id, outcome, time.perf_counter() - begun)

    async def _generate(
        self, request: GenerationRequest, options: pb.OutputOptions, context: Context
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The grammar of a generation stream: started, deltas, ends; each under the name of the field it fills."""
        arrived = time.perf_counter()
        with self._open(request, context) as stream:
            async for event in _paced(stream, _coalescer(options)):
                match event:
                    case Admitted():
                        queue_s = time.perf_counter() - arrived
                        await _send_headers(request, context)
                        yield {"started": convert.started(request, self._pair(), queue_s)}
                    case SequenceDelta():
                        yield {"delta": convert.delta(event)}
                    case SequenceFinished():
                        yield {"finished": convert.finished(event, request)}


async def _paced(
    stream: EventStream, coalescer: EventCoalescer
) -> AsyncIterator[Admitted | SequenceDelta | SequenceFinished]:
    """The events of a stream, with deltas merged as the caller asked."""
    while not stream.exhausted:
        event = await stream.next(coalescer.wait_s(time.perf_counter()))
        now = time.perf_counter()
        if isinstance(event, Admitted):
            yield event
        elif isinstance(event, SequenceDelta | SequenceFinished):
            for each in coalescer.add(event, now):
                yield each
        for each in coalescer.due(now):
            yield each


def _coalescer(options: pb.OutputOptions) -> EventCoalescer:
    max_tokens = options.max_tokens_per_event if options.HasField("max_tokens_per_event") else 1
    delayed = options.HasField("max_event_delay")
    return EventCoalescer(max_tokens, convert.seconds(options.max_event_delay) if delayed else None)


async def _send_headers(request: GenerationRequest | ScoreRequest, context: Context) -> None:
    """From here on no proxy retries the call, so this happens on admission only."""
    log.info("generation %s admitted, %d prompt tokens", request.request_id, len(request.prompt_ids))
    await context.send_initial_metadata(((GENERATION_ID_KEY, request.request_id), (REQUEST_ID_KEY, request_id.get())))


def _loading() -> Loading:
    return Loading("The models are being loaded; try again shortly.", retry_after_s=1.0)
