"""The methods of lda.v1.LdaService.

Each turns a message into a request of the worker and the worker's events into messages. Knows the order of a stream:
headers and `started` on admission and not before, so that a refusal can be retried elsewhere; then deltas; then the end
of every sequence. Raises `LdaError`s; interceptors make statuses of them, and wrap every method in a generator of their
own, which gRPC asks for.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, TypeVar

from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc

from lda_service.engine.request import Admitted, ScoreBlock, SequenceDelta, SequenceFinished
from lda_service.rpc import convert
from lda_service.rpc.access import caller_of
from lda_service.rpc.coalesce import EventCoalescer
from lda_service.rpc.interceptors import request_id
from lda_service.rpc.status import REQUEST_ID_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import grpc

    from lda_service.config import EngineConfig
    from lda_service.engine.request import GenerationRequest, ScoreRequest
    from lda_service.rpc.convert import Prompter
    from lda_service.rpc.generations import Generations

    Context = grpc.aio.ServicerContext[Any, Any]
    Convert = Callable[["_RequestT", str, Prompter, EngineConfig], GenerationRequest]

GENERATION_ID_KEY = "x-generation-id"

_RequestT = TypeVar("_RequestT", pb.GenerateLDARequest, pb.GenerateBothRequest)
_ResponseT = TypeVar("_ResponseT", pb.GenerateLDAResponse, pb.GenerateBothResponse)

log = logging.getLogger(__name__)


class LdaServicer(lda_service_pb2_grpc.LdaServiceServicer):
    """Serves generations and facts about them."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    def GenerateLDA(  # noqa: N802
        self, request: pb.GenerateLDARequest, context: Context
    ) -> AsyncIterator[pb.GenerateLDAResponse]:
        """Samples from the amplified distribution."""
        return self._generate(convert.generate_lda, request, pb.GenerateLDAResponse, context)

    def GenerateBoth(  # noqa: N802
        self, request: pb.GenerateBothRequest, context: Context
    ) -> AsyncIterator[pb.GenerateBothResponse]:
        """Samples from each model on its own."""
        return self._generate(convert.generate_both, request, pb.GenerateBothResponse, context)

    async def Score(  # noqa: N802
        self, request: pb.ScoreRequest, context: Context
    ) -> AsyncIterator[pb.ScoreResponse]:
        """Teacher-forces a text."""
        scoring = await self._generations.render(convert.score, request)
        with self._generations.run(scoring, caller_of(context), context) as generation:
            while not generation.exhausted:
                event = await generation.next()
                if isinstance(event, Admitted):
                    await _send_headers(scoring, context)
                elif isinstance(event, ScoreBlock):
                    yield convert.score_block(event, scoring)

    async def TokenizerCompat(  # noqa: N802
        self, request: pb.TokenizerCompatRequest, context: Context
    ) -> pb.TokenizerCompatResponse:
        """The vocabulary report of the loaded pair."""
        return convert.compatibility(self._generations.pair().compatibility)

    async def GetModelPair(  # noqa: N802
        self, request: pb.GetModelPairRequest, context: Context
    ) -> pb.GetModelPairResponse:
        """What is loaded."""
        return convert.model_pair(
            self._generations.pair(), self._generations.limits, self._generations.admission_limits
        )

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:  # noqa: N802
        """How busy the server is."""
        generations = self._generations
        return convert.load(
            generations.engine_load,
            generations.admission,
            generations.limits,
            accepts_work=generations.accepts_work,
        )

    async def _generate(
        self, convert_request: Convert[_RequestT], message: _RequestT, response: type[_ResponseT], context: Context
    ) -> AsyncIterator[_ResponseT]:
        """The grammar of a generation stream: started, deltas as merged as the caller asked, ends.

        One generator from the engine's events to messages: every token passes through each that there is.
        """
        request = await self._generations.render(convert_request, message)
        coalescer, now = _coalescer(message.output), time.perf_counter()
        arrived = now
        with self._generations.run(request, caller_of(context), context) as generation:
            while not generation.exhausted:
                event = await generation.next(coalescer.wait_s(now))
                now = time.perf_counter()
                for part in coalescer.take(event, now):
                    match part:
                        case SequenceDelta():
                            sent = response()
                            convert.write_delta(part, sent.delta)
                            yield sent
                        case SequenceFinished():
                            yield response(finished=convert.finished(part, request))
                        case Admitted():
                            await _send_headers(request, context)
                            yield response(started=convert.started(request, self._generations.pair(), now - arrived))


def _coalescer(options: pb.OutputOptions) -> EventCoalescer:
    max_tokens = options.max_tokens_per_event if options.HasField("max_tokens_per_event") else 1
    delayed = options.HasField("max_event_delay")
    return EventCoalescer(max_tokens, convert.seconds(options.max_event_delay) if delayed else None)


async def _send_headers(request: GenerationRequest | ScoreRequest, context: Context) -> None:
    """From here on no proxy retries the call, so this happens on admission only."""
    log.info("generation %s admitted, %d prompt tokens", request.request_id, len(request.prompt_ids))
    await context.send_initial_metadata(((GENERATION_ID_KEY, request.request_id), (REQUEST_ID_KEY, request_id.get())))
