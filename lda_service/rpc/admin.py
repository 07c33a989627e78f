"""The methods of lda.v1.AdminService: what is open, and the end of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lda_client.gen.lda.v1 import admin_service_pb2 as pb
from lda_client.gen.lda.v1 import admin_service_pb2_grpc

from lda_service.rpc.convert import duration
from lda_service.worker.messages import sequences_of

if TYPE_CHECKING:
    import grpc

    from lda_service.rpc.generations import Generations

    Context = grpc.aio.ServicerContext[Any, Any]


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """For operators."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def ListGenerations(  # noqa: N802
        self, request: pb.ListGenerationsRequest, context: Context
    ) -> pb.ListGenerationsResponse:
        """What is open, the oldest first."""
        now = time.perf_counter()
        return pb.ListGenerationsResponse(
            generations=[
                pb.Generation(
                    generation_id=generation_id,
                    caller=each.ticket.caller,
                    admitted=not each.ticket.is_waiting,
                    age=duration(now - each.arrived),
                    prompt_token_count=len(each.request.prompt_ids),
                    sequence_count=sequences_of(each.request),
                )
                for generation_id, each in self._generations.open.items()
            ]
        )

    async def AbortGeneration(  # noqa: N802
        self, request: pb.AbortGenerationRequest, context: Context
    ) -> pb.AbortGenerationResponse:
        """End one."""
        self._generations.abort(request.generation_id)
        return pb.AbortGenerationResponse()
