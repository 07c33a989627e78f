"""The methods of lda.v1.CompletionService: whole answers in the JSON fields of an earlier HTTP server.

Each message is turned into the one that `LdaService` takes for the same thing, so that limits, errors and tokens are
those of `LdaService`. Knows the fields of that server and what they meant; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.struct_pb2 import NULL_VALUE, Value
from lda_client.gen.lda.v1 import completion_service_pb2 as pb
from lda_client.gen.lda.v1 import completion_service_pb2_grpc
from lda_client.gen.lda.v1 import lda_service_pb2 as lda

from lda_service.engine.request import FinishReason, Role, SequenceDelta, SequenceFinished
from lda_service.errors import InvalidRequest
from lda_service.rpc import convert
from lda_service.rpc.access import caller_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from lda_service.config import EngineConfig
    from lda_service.engine.request import GenerationRequest
    from lda_service.rpc.convert import Prompter
    from lda_service.rpc.generations import Generations

    Context = grpc.aio.ServicerContext[Any, Any]
    Request = pb.CompleteLDARequest | pb.CompleteLDABatchRequest | pb.CompleteBothRequest

MAX_NEW_TOKENS, TEMPERATURE, TOP_P = 80, 0.8, 0.95


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request of the worker, and its prompt as the models will see it."""

    request: GenerationRequest
    prompt: str
    formatted_prompt: str
    prompter: Prompter


@dataclass(frozen=True, slots=True)
class Answer:
    """What one role said."""

    completion: str
    text: str
    tokens: int
    reason: FinishReason


class CompletionServicer(completion_service_pb2_grpc.CompletionServiceServicer):
    """Gathers the streams of the same engine into whole answers."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def CompleteLDA(  # noqa: N802
        self, request: pb.CompleteLDARequest, context: Context
    ) -> pb.CompleteLDAResponse:
        """One continuation of one prompt."""
        prepared = await self._generations.render(_prepare(_amplified, request.prompt), request)
        answer = (await self._gather(prepared, context))[Role.AMPLIFIED]
        return pb.CompleteLDAResponse(
            prompt=prepared.prompt,
            formatted_prompt=prepared.formatted_prompt,
            completion=answer.completion,
            text=answer.text,
            alpha=_alpha(request),
            tokens_generated=answer.tokens,
            stopped_early=answer.reason is FinishReason.EOS,
            **self._names(),
        )

    async def CompleteLDABatch(  # noqa: N802
        self, request: pb.CompleteLDABatchRequest, context: Context
    ) -> pb.CompleteLDABatchResponse:
        """One continuation of each prompt; all of them, or an error."""
        prepared = [await self._generations.render(_prepare(_amplified, prompt), request) for prompt in request.prompts]
        answers = await self._gather_all(prepared, context)
        results = []
        for each, answer in zip(prepared, answers, strict=True):
            results.append(
                pb.CompletedPrompt(
                    prompt=each.prompt,
                    formatted_prompt=each.formatted_prompt,
                    completion=answer.completion,
                    text=answer.text,
                    tokens_generated=answer.tokens,
                    stopped_early=answer.reason is FinishReason.EOS,
                )
            )
        return pb.CompleteLDABatchResponse(
            results=results, alpha=_alpha(request), batch_size=len(results), **self._names()
        )

    async def CompleteBoth(  # noqa: N802
        self, request: pb.CompleteBothRequest, context: Context
    ) -> pb.CompleteBothResponse:
        """One continuation by each model."""
        prepared = await self._generations.render(_prepare(_both, request.prompt), request)
        answers, pair = await self._gather(prepared, context), self._generations.pair()
        after, before = (
            pb.ModelCompletion(model_id=model.model_id, completion=answer.completion, text=answer.text)
            for model, answer in ((pair.after, answers[Role.AFTER]), (pair.before, answers[Role.BEFORE]))
        )
        return pb.CompleteBothResponse(prompt=prepared.prompt, model_1=after, model_2=before)

    async def CheckTokenizers(  # noqa: N802
        self, request: pb.CheckTokenizersRequest, context: Context
    ) -> pb.CheckTokenizersResponse:
        """The vocabulary report in short."""
        report = self._generations.pair().compatibility
        equal = report.vocabularies_equal
        return pb.CheckTokenizersResponse(
            compatible=report.compatible,
            vocab_size_1=report.after_vocab_size,
            vocab_size_2=report.before_vocab_size,
            vocabs_match=equal,
            warning=Value(null_value=NULL_VALUE) if equal else Value(string_value=report.verdict),
        )

    async def _gather_all(self, prepared: list[Prepared], context: Context) -> list[Answer]:
        """All answers; the first error ends the others."""
        tasks = [asyncio.create_task(self._gather(each, context)) for each in prepared]
        try:
            return [answers[Role.AMPLIFIED] for answers in await asyncio.gather(*tasks)]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _gather(self, prepared: Prepared, context: Context) -> dict[Role, Answer]:
        """Read a generation of one sequence for each role to its end."""
        request = prepared.request
        said: dict[Role, list[SequenceDelta]] = {branch.role: [] for branch in request.branches}
        ends: dict[Role, SequenceFinished] = {}
        with self._generations.run(request, caller_of(context), context) as generation:
            while not generation.exhausted:
                event = await generation.next()
                if isinstance(event, SequenceDelta):
                    said[event.role].append(event)
                elif isinstance(event, SequenceFinished):
                    ends[event.role] = event
        return {role: _answer(prepared, deltas, ends[role]) for role, deltas in said.items()}

    def _names(self) -> dict[str, str]:
        pair = self._generations.pair()
        return {"model_after": pair.after.model_id, "model_before": pair.before.model_id}


def _answer(prepared: Prepared, deltas: list[SequenceDelta], end: SequenceFinished) -> Answer:
    ids = [token.token_id for delta in deltas for token in delta.tokens]
    whole = prepared.prompter.decode([*prepared.request.prompt_ids, *ids])
    return Answer("".join(delta.text for delta in deltas), whole, end.output_tokens, end.reason)


def _prepare(
    make: Callable[[Request, lda.Prompt, str, Prompter, EngineConfig], GenerationRequest], prompt: str
) -> Callable[[Request, str, Prompter, EngineConfig], Prepared]:
    """For `Generations.render`: the worker's request for one prompt of a message."""

    def prepare(message: Request, generation_id: str, prompter: Prompter, limits: EngineConfig) -> Prepared:
        rendered, formatted = _prompt(message, prompt, prompter)
        return Prepared(make(message, rendered, generation_id, prompter, limits), prompt, formatted, prompter)

    return prepare


def _prompt(message: Request, prompt: str, prompter: Prompter) -> tuple[lda.Prompt, str]:
    """The prompt as `LdaService` takes it, and as text."""
    templated = message.apply_chat_template if message.HasField("apply_chat_template") else prompter.has_chat_template
    if not templated:
        if message.HasField("system_prompt"):
            raise InvalidRequest(
                "Raw text has no system message: drop system_prompt, or set apply_chat_template.", field="system_prompt"
            )
        return lda.Prompt(text=prompt), prompt
    turns = [("system", message.system_prompt)] if message.HasField("system_prompt") else []
    turns.append(("user", prompt))
    chat = lda.Chat(messages=[lda.ChatMessage(role=role, content=content) for role, content in turns])
    return lda.Prompt(chat=chat), prompter.rendered(turns) if prompter.has_chat_template else prompt


def _amplified(
    message: Request, prompt: lda.Prompt, generation_id: str, prompter: Prompter, limits: EngineConfig
) -> GenerationRequest:
    assert not isinstance(message, pb.CompleteBothRequest)
    request = lda.GenerateLDARequest(
        prompt=prompt, alpha=_alpha(message), sampling=_sampling(message), stopping=_stopping(message)
    )
    return convert.generate_lda(request, generation_id, prompter, limits)


def _both(
    message: Request, prompt: lda.Prompt, generation_id: str, prompter: Prompter, limits: EngineConfig
) -> GenerationRequest:
    sampling = _sampling(message)
    if message.HasField("do_sample") and not message.do_sample:
        sampling.temperature = 0
    request = lda.GenerateBothRequest(prompt=prompt, sampling=sampling, stopping=_stopping(message))
    return convert.generate_both(request, generation_id, prompter, limits)


def _alpha(message: pb.CompleteLDARequest | pb.CompleteLDABatchRequest) -> float:
    return message.alpha if message.HasField("alpha") else convert.DEFAULT_ALPHA


def _sampling(message: Request) -> lda.Sampling:
    temperature = message.temperature if message.HasField("temperature") else TEMPERATURE
    top_p = message.top_p if message.HasField("top_p") else TOP_P
    return lda.Sampling(temperature=temperature, top_p=top_p)


def _stopping(message: Request) -> lda.Stopping:
    return lda.Stopping(max_new_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else MAX_NEW_TOKENS)
