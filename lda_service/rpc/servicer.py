"""The methods of lda.v1.LdaService.

Each turns a message into a request of the worker and the worker's events into messages. Knows the order of a stream:
headers and `started` on admission and not before, so that a refusal can be retried elsewhere; then deltas; then the end
of every sequence. Raises `LdaError`s; interceptors make statuses of them.
"""

from __future__ import annotations

import logging
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc

from lda_service.engine.request import Admitted, ScoreBlock, SequenceDelta, SequenceFinished
from lda_service.rpc import convert
from lda_service.rpc.access import caller_of
from lda_service.rpc.coalesce import EventCoalescer
from lda_service.rpc.interceptors import request_id
from lda_service.rpc.status import REQUEST_ID_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    import grpc

    from lda_service.engine.request import GenerationRequest, ScoreRequest
    from lda_service.rpc.generations import Generation, Generations

    Context = grpc.aio.ServicerContext[Any, Any]

GENERATION_ID_KEY = "x-generation-id"

log = logging.getLogger(__name__)


class LdaServicer(lda_service_pb2_grpc.LdaServiceServicer):
    """Serves generations and facts about them."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def GenerateLDA(  # noqa: N802
        self, request: pb.GenerateLDARequest, context: Context
    ) -> AsyncIterator[pb.GenerateLDAResponse]:
        """Samples from the amplified distribution."""
        generation = await self._generations.render(convert.generate_lda, request)
        async with aclosing(self._generate(generation, request.output, context)) as parts:
            async for part in parts:
                yield pb.GenerateLDAResponse(**part)

    async def GenerateBoth(  # noqa: N802
        self, request: pb.GenerateBothRequest, context: Context
    ) -> AsyncIterator[pb.GenerateBothResponse]:
        """Samples from each model on its own."""
        generation = await self._generations.render(convert.generate_both, request)
        async with aclosing(self._generate(generation, request.output, context)) as parts:
            async for part in parts:
                yield pb.GenerateBothResponse(**part)

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
        self, request: GenerationRequest, options: pb.OutputOptions, context: Context
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The grammar of a generation stream: started, deltas, ends; each under the name of the field it fills."""
        arrived = time.perf_counter()
        with self._generations.run(request, caller_of(context), context) as generation:
            async for event in _paced(generation, _coalescer(options)):
                match event:
                    case Admitted():
                        queue_s = time.perf_counter() - arrived
                        await _send_headers(request, context)
                        yield {"started": convert.started(request, self._generations.pair(), queue_s)}
                    case SequenceDelta():
                        yield {"delta": convert.delta(event)}
                    case SequenceFinished():
                        yield {"finished": convert.finished(event, request)}


async def _paced(
    generation: Generation, coalescer: EventCoalescer
) -> AsyncIterator[Admitted | SequenceDelta | SequenceFinished]:
    """The events of a generation, with deltas merged as the caller asked."""
    while not generation.exhausted:
        event = await generation.next(coalescer.wait_s(time.perf_counter()))
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
