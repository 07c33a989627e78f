"""What a streaming verb sends and how its answer is read, decided before any call and alike for both clients.

Knows requests and readers; nothing of channels. One question stays open until the server has been asked: whether the
pair has a chat template, see `Plan.chat_preferred`.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lda_client._gather import GenerateReader, ScoreReader
from lda_client._requests import (
    GenerateBothOptions,
    GenerateOptions,
    build_continuation,
    build_prompt,
    generate_both_request,
    generate_request,
    prefers_chat,
    score_request,
)
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lda_client._requests import ContinuationLike

RequestT = TypeVar("RequestT", pb.GenerateLDARequest, pb.GenerateBothRequest, pb.ScoreRequest)
ReaderT = TypeVar("ReaderT", GenerateReader, ScoreReader)


@dataclass(frozen=True)
class Plan(Generic[RequestT, ReaderT]):
    """A method of the service, its request, the reader of its stream.

    Attributes:
        method: its name in the contract.
        request: what is sent.
        reader: follows the stream.
        chat_preferred: whether the prompt becomes plain text if there is no chat template.
    """

    method: str
    request: RequestT
    reader: ReaderT
    chat_preferred: bool

    @property
    def scores(self) -> bool:
        """Whether the stream is one of blocks, not of a generation."""
        return isinstance(self.reader, ScoreReader)

    @property
    def affinity(self) -> str:
        """A digest of the prompt, by which a balancer sends calls of one prompt to the server that holds its pages."""
        return sha256(self.request.prompt.SerializeToString(deterministic=True)).hexdigest()[:16]

    def settle(self, has_chat_template: bool) -> None:
        """Decide the form of the prompt, now that it is known what the pair can render."""
        prompt = self.request.prompt
        if self.chat_preferred and not has_chat_template and prompt.HasField("chat"):
            prompt.text = prompt.chat.messages[0].content


@dataclass(frozen=True)
class PromptArguments:
    """The arguments of every streaming verb that say what to continue; `prompt` may be a whole request."""

    prompt: Any
    system: str | None = None
    raw: bool = False
    continue_final_message: bool = False

    @property
    def chat_preferred(self) -> bool:
        """Whether the prompt is a plain string, sent as a user turn only if the pair has a chat template."""
        return prefers_chat(self.prompt, system=self.system, raw=self.raw)

    def message(self) -> pb.Prompt:
        """The message of the contract. Raises TypeError or ValueError."""
        return build_prompt(
            self.prompt, system=self.system, raw=self.raw, continue_final_message=self.continue_final_message
        )

    def whole(self, kind: type[RequestT], others: Mapping[str, Any]) -> RequestT | None:
        """A copy of the request, if the prompt is one. Raises ValueError if it does not come alone."""
        if not isinstance(self.prompt, kind):
            return None
        given = {**vars(self), **others, "prompt": None}
        for name, value in given.items():
            if value is not None and value is not False:
                raise ValueError(f"{name}: goes with no whole request; set it in the request itself.")
        request = kind()
        request.CopyFrom(self.prompt)
        return request


def plan_generate(prompt: PromptArguments, options: GenerateOptions) -> Plan[pb.GenerateLDARequest, GenerateReader]:
    """Plan `generate`. Raises TypeError or ValueError for an argument that fits no request."""
    request = prompt.whole(pb.GenerateLDARequest, options) or generate_request(prompt.message(), **options)
    alphas = options.get("score_alphas") or request.output.score_alphas
    reader = GenerateReader(request.num_sequences or 1, alphas)
    return Plan("GenerateLDA", request, reader, prompt.chat_preferred)


def plan_generate_both(
    prompt: PromptArguments, options: GenerateBothOptions
) -> Plan[pb.GenerateBothRequest, GenerateReader]:
    """Plan `generate_both`: as many sequences from each of the two models. Raises as `plan_generate`."""
    request = prompt.whole(pb.GenerateBothRequest, options) or generate_both_request(prompt.message(), **options)
    alphas = options.get("score_alphas") or request.output.score_alphas
    reader = GenerateReader(2 * (request.num_sequences or 1), alphas)
    return Plan("GenerateBoth", request, reader, prompt.chat_preferred)


def plan_score(
    prompt: PromptArguments,
    continuation: ContinuationLike | None = None,
    *,
    alpha: float | None = None,
    top_candidates: int | None = None,
    score_alphas: Sequence[float] | None = None,
) -> Plan[pb.ScoreRequest, ScoreReader]:
    """Plan `score`. Raises as `plan_generate`."""
    others = {"alpha": alpha, "top_candidates": top_candidates, "score_alphas": score_alphas}
    request = prompt.whole(pb.ScoreRequest, {"continuation": continuation, **others})
    if request is None:
        message = prompt.message()
        if continuation is None:
            raise TypeError("continuation: is missing; give the text or the token ids to score.")
        request = score_request(
            message,
            build_continuation(continuation),
            alpha=alpha,
            top_candidates=top_candidates,
            score_alphas=score_alphas,
        )
    return Plan("Score", request, ScoreReader(score_alphas or request.score_alphas), prompt.chat_preferred)
