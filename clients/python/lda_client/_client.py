"""`LdaClient`: the verbs of the service for synchronous code. `_client_async.py` is its asyncio twin.

Holds a channel and the few lines that block. Requests, events and errors are made elsewhere, for both clients alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, Unpack

import grpc

from lda_client._channel import CHANNEL_OPTIONS, DEFAULT_TARGET, Connection, Timeout
from lda_client._errors import error_from_rpc, server_away
from lda_client._plans import Plan, PromptArguments, plan_generate, plan_generate_both, plan_score
from lda_client._stream import GenerateStream, ScoreStream
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceStub

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from lda_client._gather import Completion
    from lda_client._requests import ContinuationLike, GenerateBothOptions, GenerateOptions, PromptLike


class LdaClient:
    """Client of one LDA server, for synchronous code. A context manager; threads may share it.

        with LdaClient() as client:
            print(client.complete("Who are you?", alpha=2.0)[0].text)

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
        self._channel = (
            grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
            if credentials
            else grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        )
        self._stub = LdaServiceStub(self._channel)
        self._has_chat_template: bool | None = None

    def generate(
        self,
        prompt: PromptLike,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerateStream[pb.GenerateLDAResponse]:
        """Stream text sampled from `after + alpha * (after - before)`.

        Args:
            prompt: a string (sent as one user turn if the pair has a chat template), turns as {"role", "content"} or
                (role, content), token ids, or a message of the contract.
            system: a system turn to put before the prompt.
            raw: send the string as it is, without the chat template.
            continue_final_message: continue the last turn of a conversation instead of opening a new one.
            timeout_s: deadline of this call in seconds; None takes `Timeout.total_s`.
            options: alpha, num_sequences, temperature, top_p, top_k, min_p, plausibility, seed, max_new_tokens,
                min_new_tokens, ignore_eos, stop, stop_token_ids, time_budget_s, diagnostics, top_candidates,
                max_tokens_per_event, max_event_delay_s, score_alphas: see `GenerateOptions`.

        Raises:
            TypeError, ValueError: for an argument that fits no request.
            LdaClientError: here or from iteration, if the call fails.
        """
        plan = plan_generate(PromptArguments(prompt, system, raw, continue_final_message), options)
        self._prepare(plan)
        call = self._stub.GenerateLDA(plan.request, **self._connection.stream_options(timeout_s))
        return GenerateStream(call, plan.reader, self._connection.target)

    def generate_both(
        self,
        prompt: PromptLike,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateBothOptions],
    ) -> GenerateStream[pb.GenerateBothResponse]:
        """Stream text sampled from each model on its own; `role` tells them apart.

        Arguments and errors as `generate`, without alpha; `num_sequences` are drawn from each model.
        """
        plan = plan_generate_both(PromptArguments(prompt, system, raw, continue_final_message), options)
        self._prepare(plan)
        call = self._stub.GenerateBoth(plan.request, **self._connection.stream_options(timeout_s))
        return GenerateStream(call, plan.reader, self._connection.target)

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
    ) -> ScoreStream:
        """Teacher-force a continuation through both models; a stream of blocks, `.gather()` for the whole.

        Args:
            prompt: as in `generate`; it is not scored.
            continuation: text or token ids to score; never put through the chat template.
            system: as in `generate`.
            raw: as in `generate`.
            continue_final_message: as in `generate`.
            alpha: at which the amplified values are taken.
            top_candidates: alternatives per position, 50 at most.
            score_alphas: alphas at which the whole continuation is scored.
            timeout_s: deadline of this call in seconds; None takes `Timeout.total_s`.

        Raises:
            TypeError, ValueError: for an argument that fits no request.
            LdaClientError: here or from iteration, if the call fails.
        """
        plan = plan_score(
            PromptArguments(prompt, system, raw, continue_final_message),
            continuation,
            alpha=alpha,
            top_candidates=top_candidates,
            score_alphas=score_alphas,
        )
        self._prepare(plan)
        call = self._stub.Score(plan.request, **self._connection.stream_options(timeout_s))
        return ScoreStream(call, plan.reader, self._connection.target)

    def complete(
        self,
        prompt: PromptLike,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]:
        """Generate and return the finished sequences, by index. Arguments and errors as `generate`."""
        stream = self.generate(
            prompt,
            system=system,
            raw=raw,
            continue_final_message=continue_final_message,
            timeout_s=timeout_s,
            **options,
        )
        return list(stream.gather())

    def tokenizer_compat(self, *, timeout_s: float | None = None) -> pb.TokenizerCompatResponse:
        """Whether the two tokenizers can be used as one pair, with the evidence. Raises LdaClientError."""
        self._connect()
        try:
            return self._stub.TokenizerCompat(pb.TokenizerCompatRequest(), **self._connection.lookup_options(timeout_s))
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._connection.target) from error

    def model_pair(self, *, timeout_s: float | None = None) -> pb.GetModelPairResponse:
        """The loaded pair, the limits in force and the defaults of the server. Raises LdaClientError."""
        self._connect()
        try:
            pair = self._stub.GetModelPair(pb.GetModelPairRequest(), **self._connection.lookup_options(timeout_s))
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._connection.target) from error
        self._has_chat_template = pair.has_chat_template
        return pair

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.target!r})"

    def _prepare(self, plan: Plan[Any, Any]) -> None:
        """Connect, and ask once whether the pair has a chat template if the form of the prompt hangs on it."""
        self._connect()
        if plan.chat_preferred and self._has_chat_template is None:
            self._has_chat_template = self.model_pair().has_chat_template
        plan.settle(bool(self._has_chat_template))

    def _connect(self) -> None:
        """Wait for the connection, if we were told to."""
        connect_s = self._connection.timeout.connect_s
        if connect_s is None:
            return
        try:
            grpc.channel_ready_future(self._channel).result(timeout=connect_s)
        except grpc.FutureTimeoutError:
            raise server_away(self._connection.target, connect_s) from None
