"""What a streaming verb sends and how its answer is read, decided before any call and alike for both clients.

Knows requests and readers; nothing of channels. One question stays open until the server has been asked: whether the
pair has a chat template, see `Plan.chat_preferred`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

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
    from collections.abc import Sequence

    from lda_client._requests import ContinuationLike, PromptLike

RequestT = TypeVar("RequestT", pb.GenerateLDARequest, pb.GenerateBothRequest, pb.ScoreRequest)
ReaderT = TypeVar("ReaderT", GenerateReader, ScoreReader)


@dataclass(frozen=True)
class Plan(Generic[RequestT, ReaderT]):
    """A request, the reader of its stream, and whether its prompt becomes plain text if there is no chat template."""

    request: RequestT
    reader: ReaderT
    chat_preferred: bool

    def settle(self, has_chat_template: bool) -> None:
        """Decide the form of the prompt, now that it is known what the pair can render."""
        prompt = self.request.prompt
        if self.chat_preferred and not has_chat_template and prompt.HasField("chat"):
            prompt.text = prompt.chat.messages[0].content


@dataclass(frozen=True)
class PromptArguments:
    """The arguments of every streaming verb that say what to continue."""

    prompt: PromptLike
    system: str | None
    raw: bool
    continue_final_message: bool

    @property
    def chat_preferred(self) -> bool:
        """Whether the prompt is a plain string, sent as a user turn only if the pair has a chat template."""
        return prefers_chat(self.prompt, system=self.system, raw=self.raw)

    def message(self) -> pb.Prompt:
        """The message of the contract. Raises TypeError or ValueError."""
        return build_prompt(
            self.prompt, system=self.system, raw=self.raw, continue_final_message=self.continue_final_message
        )


def plan_generate(prompt: PromptArguments, options: GenerateOptions) -> Plan[pb.GenerateLDARequest, GenerateReader]:
    """Plan `generate`. Raises TypeError or ValueError for an argument that fits no request."""
    request = generate_request(prompt.message(), **options)
    reader = GenerateReader(request.num_sequences or 1, options.get("score_alphas") or ())
    return Plan(request, reader, prompt.chat_preferred)


def plan_generate_both(
    prompt: PromptArguments, options: GenerateBothOptions
) -> Plan[pb.GenerateBothRequest, GenerateReader]:
    """Plan `generate_both`: as many sequences from each of the two models. Raises as `plan_generate`."""
    request = generate_both_request(prompt.message(), **options)
    reader = GenerateReader(2 * (request.num_sequences or 1), options.get("score_alphas") or ())
    return Plan(request, reader, prompt.chat_preferred)


def plan_score(
    prompt: PromptArguments,
    continuation: ContinuationLike,
    *,
    alpha: float | None,
    top_candidates: int | None,
    score_alphas: Sequence[float] | None,
) -> Plan[pb.ScoreRequest, ScoreReader]:
    """Plan `score`. Raises as `plan_generate`."""
    request = score_request(
        prompt.message(),
        build_continuation(continuation),
        alpha=alpha,
        top_candidates=top_candidates,
        score_alphas=score_alphas,
    )
    return Plan(request, ScoreReader(score_alphas or ()), prompt.chat_preferred)
