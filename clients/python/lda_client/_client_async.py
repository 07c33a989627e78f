"""`AsyncLdaClient`: the verbs of the service for asyncio. `_client.py` is its synchronous twin.

Holds a channel and the few lines that await. Verbs, requests, events and errors are made elsewhere, for both alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

import grpc

from lda_client._errors import error_from_rpc, server_away
from lda_client._gather import Completions
from lda_client._stream import AsyncGenerateStream, AsyncScoreStream
from lda_client._verbs import ARGUMENTS, Verbs
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceStub

if TYPE_CHECKING:
    from types import TracebackType

    from google.protobuf.message import Message

    from lda_client._plans import Plan
    from lda_client._stream import AsyncCall
    from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceAsyncStub


class AsyncLdaClient(
    Verbs[
        AsyncGenerateStream[pb.GenerateLDAResponse],
        AsyncGenerateStream[pb.GenerateBothResponse],
        AsyncScoreStream,
        Coroutine[Any, Any, Completions],
        Coroutine[Any, Any, pb.TokenizerCompatResponse],
        Coroutine[Any, Any, pb.GetModelPairResponse],
    ]
):
    __doc__ = f"""Client of one LDA server, for asyncio. An async context manager, of the loop that first uses it.

        async with AsyncLdaClient() as client:
            print((await client.complete("Who are you?", alpha=2.0))[0].text)

    A stream begins at `async with` or at its first event, not at the call of the verb; the other verbs are awaited.
    {ARGUMENTS}"""

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        """Made at first use: a channel of grpc.aio belongs to the loop in which it is made."""
        return self._connection.open(grpc.aio.secure_channel, grpc.aio.insecure_channel)

    @cached_property
    def _stub(self) -> LdaServiceAsyncStub:
        return LdaServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _stream(self, plan: Plan[Any, Any], timeout_s: float | None) -> AsyncGenerateStream[Any] | AsyncScoreStream:
        begin = partial(self._begin, plan, timeout_s)
        return (AsyncScoreStream if plan.scores else AsyncGenerateStream)(begin, plan, self._connection.target)

    async def _begin(self, plan: Plan[Any, Any], timeout_s: float | None) -> AsyncCall[Any]:
        await self._connect()
        if self._asks_for_template(plan):
            await self.model_pair()
        plan.settle(bool(self._has_chat_template))
        options = self._connection.stream_options(timeout_s, plan.affinity)
        call: AsyncCall[Any] = getattr(self._stub, plan.method)(plan.request, **options)
        return call

    async def _look_up(self, method: str, request: Message, timeout_s: float | None) -> Message:
        await self._connect()
        try:
            answer: Message = await getattr(self._stub, method)(request, **self._connection.lookup_options(timeout_s))
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._connection.target) from error
        self._learn(answer)
        return answer

    async def _connect(self) -> None:
        """Wait for the connection, if we were told to."""
        connect_s = self._connection.timeout.connect_s
        if connect_s is None:
            return
        try:
            await asyncio.wait_for(self._channel.channel_ready(), connect_s)
        except TimeoutError:
            raise server_away(self._connection.target, connect_s) from None
