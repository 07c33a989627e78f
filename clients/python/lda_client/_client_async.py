"""`AsyncLdaClient`: the verbs of the service for asyncio. `_client.py` is its synchronous twin.

Holds a channel and the few lines that await. Requests, events and errors are made elsewhere, for both clients alike.
"""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, Unpack

import grpc

from lda_client._channel import CHANNEL_OPTIONS, DEFAULT_TARGET, Connection, Timeout
from lda_client._errors import error_from_rpc, server_away
from lda_client._plans import Plan, PromptArguments, plan_generate, plan_generate_both, plan_score
from lda_client._stream import AsyncCall, AsyncGenerateStream, AsyncScoreStream
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceStub

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from lda_client._gather import Completion
    from lda_client._requests import ContinuationLike, GenerateBothOptions, GenerateOptions, PromptLike
    from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceAsyncStub


class AsyncLdaClient:
    """Client of one LDA server, for asyncio. An async context manager; it belongs to the loop that first uses it.

        async with AsyncLdaClient() as client:
            print((await client.complete("Who are you?", alpha=2.0))[0].text)

    The verbs, their arguments and their errors are those of `LdaClient`. A stream begins at `async with` or at its
    first event, not at the call of the verb.

    Args:
        target: address of the server, `host:port` or any gRPC target.
        credentials: `grpc.ssl_channel_credentials(...)` for TLS; None speaks plain text.
        token: bearer token, sent with every call. Without `credentials` it crosses the network readable.
        timeout: how long to wait, by phase.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        timeout: Timeout | None = None,
    ) -> None:
        self._connection = Connection(target, credentials, token, timeout or Timeout())
        self._has_chat_template: bool | None = None

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        """Made at first use: a channel of grpc.aio belongs to the loop in which it is made."""
        target, credentials = self._connection.target, self._connection.credentials
        if credentials:
            return grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)

    @cached_property
    def _stub(self) -> LdaServiceAsyncStub:
        return LdaServiceStub(self._channel)

    def generate(
        self,
        prompt: PromptLike,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerateStream[pb.GenerateLDAResponse]:
        """Stream text sampled from `after + alpha * (after - before)`. See `LdaClient.generate`."""
        plan = plan_generate(PromptArguments(prompt, system, raw, continue_final_message), options)

        async def begin() -> AsyncCall[pb.GenerateLDAResponse]:
            await self._prepare(plan)
            return self._stub.GenerateLDA(plan.request, **self._connection.stream_options(timeout_s))

        return AsyncGenerateStream(begin, plan.reader, self._connection.target)

    def generate_both(
        self,
        prompt: PromptLike,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateBothOptions],
    ) -> AsyncGenerateStream[pb.GenerateBothResponse]:
        """Stream text sampled from each model on its own. See `LdaClient.generate_both`."""
        plan = plan_generate_both(PromptArguments(prompt, system, raw, continue_final_message), options)

        async def begin() -> AsyncCall[pb.GenerateBothResponse]:
            await self._prepare(plan)
            return self._stub.GenerateBoth(plan.request, **self._connection.stream_options(timeout_s))

        return AsyncGenerateStream(begin, plan.reader, self._connection.target)

    def score(
        self,
        prompt: PromptLike,
        continuation: ContinuationLike,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        alpha: float | None = None,
        top_candidates: int | None = None,
        score_alphas: Sequence[float] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncScoreStream:
        """Teacher-force a continuation through both models. See `LdaClient.score`."""
        plan = plan_score(
            PromptArguments(prompt, system, raw, continue_final_message),
            continuation,
            alpha=alpha,
            top_candidates=top_candidates,
            score_alphas=score_alphas,
        )

        async def begin() -> AsyncCall[pb.ScoreResponse]:
            await self._prepare(plan)
            return self._stub.Score(plan.request, **self._connection.stream_options(timeout_s))

        return AsyncScoreStream(begin, plan.reader, self._connection.target)

    async def complete(
        self,
        prompt: PromptLike,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]:
        """Generate and return the finished sequences, by index. See `LdaClient.complete`."""
        stream = self.generate(
            prompt,
            system=system,
            raw=raw,
            continue_final_message=continue_final_message,
            timeout_s=timeout_s,
            **options,
        )
        return list(await stream.gather())

    async def tokenizer_compat(self, *, timeout_s: float | None = None) -> pb.TokenizerCompatResponse:
        """Whether the two tokenizers can be used as one pair, with the evidence. Raises LdaClientError."""
        await self._connect()
        options = self._connection.lookup_options(timeout_s)
        try:
            return await self._stub.TokenizerCompat(pb.TokenizerCompatRequest(), **options)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._connection.target) from error

    async def model_pair(self, *, timeout_s: float | None = None) -> pb.GetModelPairResponse:
        """The loaded pair, the limits in force and the defaults of the server. Raises LdaClientError."""
        await self._connect()
        options = self._connection.lookup_options(timeout_s)
        try:
            pair = await self._stub.GetModelPair(pb.GetModelPairRequest(), **options)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._connection.target) from error
        self._has_chat_template = pair.has_chat_template
        return pair

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.target!r})"

    async def _prepare(self, plan: Plan[Any, Any]) -> None:
        """Connect, and ask once whether the pair has a chat template if the form of the prompt hangs on it."""
        await self._connect()
        if plan.chat_preferred and self._has_chat_template is None:
            self._has_chat_template = (await self.model_pair()).has_chat_template
        plan.settle(bool(self._has_chat_template))

    async def _connect(self) -> None:
        """Wait for the connection, if we were told to."""
        connect_s = self._connection.timeout.connect_s
        if connect_s is None:
            return
        try:
            await asyncio.wait_for(self._channel.channel_ready(), connect_s)
        except TimeoutError:
            raise server_away(self._connection.target, connect_s) from None
