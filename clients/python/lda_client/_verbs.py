"""The verbs of the service, written once: `LdaClient` and `AsyncLdaClient` differ in what a verb gives back.

Knows plans; how a channel is opened and how a call is made is left to the two clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack

from lda_client._channel import DEFAULT_TARGET, Connection, Timeout
from lda_client._plans import Plan, PromptArguments, plan_generate, plan_generate_both, plan_score
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc
    from google.protobuf.message import Message

    from lda_client._channel import Tls
    from lda_client._requests import ContinuationLike, GenerateBothOptions, GenerateOptions, PromptLike

GenerateT = TypeVar("GenerateT")
BothT = TypeVar("BothT")
ScoreT = TypeVar("ScoreT")
CompletionsT = TypeVar("CompletionsT")
CompatT = TypeVar("CompatT")
PairT = TypeVar("PairT")

ARGUMENTS = """
    Args:
        target: address of the server, `host:port` or any gRPC target.
        credentials: `Tls(...)`, or credentials of gRPC's own making; None speaks plain text.
        token: bearer token, sent with every call. Without `credentials` it crosses the network readable.
        timeout: how long to wait, by phase.
    """


class Verbs(ABC, Generic[GenerateT, BothT, ScoreT, CompletionsT, CompatT, PairT]):
    """What both clients can do. The type arguments are what each verb gives back, in the order of the verbs."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: Tls | grpc.ChannelCredentials | None = None,
        token: str | None = None,
        timeout: Timeout | None = None,
    ) -> None:
        self._connection = Connection(target, credentials, token, timeout or Timeout())
        self._has_chat_template: bool | None = None

    @property
    def target(self) -> str:
        """The address of the server."""
        return self._connection.target

    def generate(
        self,
        prompt: PromptLike | pb.GenerateLDARequest,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerateT:
        """Stream text sampled from `after + alpha * (after - before)`.

        Args:
            prompt: a string (sent as one user turn if the pair has a chat template), turns as {"role", "content"} or
                (role, content), token ids, or a message of the contract. A whole request is sent as it is, and goes
                with no other argument than `timeout_s`.
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
        prompt_arguments = PromptArguments(prompt, system, raw, continue_final_message)
        stream: GenerateT = self._stream(plan_generate(prompt_arguments, options), timeout_s)
        return stream

    def generate_both(
        self,
        prompt: PromptLike | pb.GenerateBothRequest,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateBothOptions],
    ) -> BothT:
        """Stream text sampled from each model on its own; `role` tells them apart.

        Arguments and errors as `generate`, without alpha; `num_sequences` are drawn from each model.
        """
        prompt_arguments = PromptArguments(prompt, system, raw, continue_final_message)
        stream: BothT = self._stream(plan_generate_both(prompt_arguments, options), timeout_s)
        return stream

    def score(
        self,
        prompt: PromptLike | pb.ScoreRequest,
        continuation: ContinuationLike | None = None,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        alpha: float | None = None,
        top_candidates: int | None = None,
        score_alphas: Sequence[float] | None = None,
        timeout_s: float | None = None,
    ) -> ScoreT:
        """Teacher-force a continuation through both models; a stream of blocks, `.gather()` for the whole.

        Args:
            prompt: as in `generate`; it is not scored.
            continuation: text or token ids to score, never put through the chat template. A whole request has its own.
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
        stream: ScoreT = self._stream(plan, timeout_s)
        return stream

    def complete(
        self,
        prompt: PromptLike | pb.GenerateLDARequest,
        *,
        system: str | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> CompletionsT:
        """Generate and return the finished sequences, by index. Arguments and errors as `generate`."""
        prompt_arguments = PromptArguments(prompt, system, raw, continue_final_message)
        completions: CompletionsT = self._stream(plan_generate(prompt_arguments, options), timeout_s).gather()
        return completions

    def tokenizer_compat(self, *, timeout_s: float | None = None) -> CompatT:
        """Whether the two tokenizers can be used as one pair, with the evidence. Raises LdaClientError."""
        report: CompatT = self._look_up("TokenizerCompat", pb.TokenizerCompatRequest(), timeout_s)
        return report

    def model_pair(self, *, timeout_s: float | None = None) -> PairT:
        """The loaded pair, the limits in force and the defaults of the server. Raises LdaClientError."""
        pair: PairT = self._look_up("GetModelPair", pb.GetModelPairRequest(), timeout_s)
        return pair

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.target!r})"

    @abstractmethod
    def _stream(self, plan: Plan[Any, Any], timeout_s: float | None) -> Any:
        """The stream of a plan."""

    @abstractmethod
    def _look_up(self, method: str, request: Message, timeout_s: float | None) -> Any:
        """The answer to a short call."""

    def _learn(self, answer: Message) -> None:
        """Keep what later calls hang on."""
        if isinstance(answer, pb.GetModelPairResponse):
            self._has_chat_template = answer.has_chat_template

    def _asks_for_template(self, plan: Plan[Any, Any]) -> bool:
        """Whether the form of the prompt hangs on a chat template of which nothing is known yet."""
        return plan.chat_preferred and self._has_chat_template is None
