"""`LdaClient`: the verbs of the service for synchronous code. `_client_async.py` is its asyncio twin.

Holds a channel and the few lines that block. Verbs, requests, events and errors are made elsewhere, for both alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import grpc

from lda_client._channel import DEFAULT_TARGET, Timeout
from lda_client._errors import error_from_rpc, server_away
from lda_client._gather import Completions
from lda_client._stream import GenerateStream, ScoreStream
from lda_client._verbs import ARGUMENTS, Verbs
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceStub

if TYPE_CHECKING:
    from types import TracebackType

    from google.protobuf.message import Message

    from lda_client._channel import Tls
    from lda_client._plans import Plan


class LdaClient(
    Verbs[
        GenerateStream[pb.GenerateLDAResponse],
        GenerateStream[pb.GenerateBothResponse],
        ScoreStream,
        Completions,
        pb.TokenizerCompatResponse,
        pb.GetModelPairResponse,
    ]
):
    __doc__ = f"""Client of one LDA server, for synchronous code. A context manager; threads may share it.

        with LdaClient() as client:
            print(client.complete("Who are you?", alpha=2.0)[0].text)
    {ARGUMENTS}"""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: Tls | grpc.ChannelCredentials | None = None,
        token: str | None = None,
        timeout: Timeout | None = None,
    ) -> None:
        super().__init__(target, credentials=credentials, token=token, timeout=timeout)
        self._channel = self._connection.open(grpc.secure_channel, grpc.insecure_channel)
        self._stub = LdaServiceStub(self._channel)

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, plan: Plan[Any, Any], timeout_s: float | None) -> GenerateStream[Any] | ScoreStream:
        self._connect()
        if self._asks_for_template(plan):
            self.model_pair()
        plan.settle(bool(self._has_chat_template))
        options = self._connection.stream_options(timeout_s, plan.affinity)
        call = getattr(self._stub, plan.method)(plan.request, **options)
        return (ScoreStream if plan.scores else GenerateStream)(call, plan, self._connection.target)

    def _look_up(self, method: str, request: Message, timeout_s: float | None) -> Message:
        self._connect()
        try:
            answer: Message = getattr(self._stub, method)(request, **self._connection.lookup_options(timeout_s))
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._connection.target) from error
        self._learn(answer)
        return answer

    def _connect(self) -> None:
        """Wait for the connection, if we were told to."""
        connect_s = self._connection.timeout.connect_s
        if connect_s is None:
            return
        try:
            grpc.channel_ready_future(self._channel).result(timeout=connect_s)
        except grpc.FutureTimeoutError:
            raise server_away(self._connection.target, connect_s) from None
