"""Protobuf messages to engine requests, and engine events to protobuf messages: the only place that knows both.

Fills in what a caller left unset and refuses what this server's limits do not allow. Rules that hold for every server
stand in the contract and were checked before. Knows nothing of calls, streams or the worker.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Protocol

from google.protobuf.duration_pb2 import Duration
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

from lda_service import __version__
from lda_service.engine.request import (
    Branch,
    FinishReason,
    GenerationRequest,
    Output,
    Role,
    Sampling,
    ScoreRequest,
    Stopping,
)
from lda_service.errors import InvalidRequest, LimitExceeded, PromptUnusable, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lda_service.config import AdmissionConfig, EngineConfig
    from lda_service.engine.request import Candidate, Diagnostics, Load, ScoreBlock, SequenceDelta, SequenceFinished
    from lda_service.engine.request import TokenRecord as EngineToken
    from lda_service.pair_info import ModelInfo, PairInfo
    from lda_service.rpc.admission import Admission
    from lda_service.vocabulary import CompatibilityReport

DEFAULT_ALPHA = 1.0

ROLES = {
    Role.AFTER: pb.MODEL_ROLE_AFTER,
    Role.BEFORE: pb.MODEL_ROLE_BEFORE,
    Role.AMPLIFIED: pb.MODEL_ROLE_AMPLIFIED,
}
REASONS = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_WINDOW: pb.FINISH_REASON_CONTEXT_WINDOW,
    FinishReason.TIME_BUDGET: pb.FINISH_REASON_TIME_BUDGET,
}


class Prompter(Protocol):
    """Renders what a caller sends to token ids; may raise any `RequestError`."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be rendered."""

    def text(self, text: str) -> tuple[int, ...]:
        """Ids of raw text, with the special tokens that open a sequence."""

    def continuation(self, text: str) -> tuple[int, ...]:
        """Ids of raw text that follows other text: no special tokens."""

    def chat(self, messages: Sequence[tuple[str, str]], continue_final_message: bool = False) -> tuple[int, ...]:
        """Ids of a conversation."""

    def rendered(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation as the chat template writes it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text, without special tokens."""


def defaults(limits: EngineConfig) -> pb.GenerateLDARequest:
    """The values a request gets where it sets none, as `GetModelPair` reports them. The seed has no fixed default."""
    sampling, stopping = Sampling(), Stopping()
    return pb.GenerateLDARequest(
        alpha=DEFAULT_ALPHA,
        num_sequences=1,
        sampling=pb.Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            plausibility=sampling.plausibility,
        ),
        stopping=pb.Stopping(max_new_tokens=min(stopping.max_new_tokens, limits.max_new_tokens)),
        output=pb.OutputOptions(max_tokens_per_event=1),
    )


def generate_lda(
    request: pb.GenerateLDARequest, generation_id: str, prompter: Prompter, limits: EngineConfig
) -> GenerationRequest:
    """One branch, at the request's alpha."""
    alpha = request.alpha if request.HasField("alpha") else DEFAULT_ALPHA
    _check_alpha(alpha, "alpha", limits)
    return _generation(request, (Branch(Role.AMPLIFIED, alpha),), generation_id, prompter, limits)


def generate_both(
    request: pb.GenerateBothRequest, generation_id: str, prompter: Prompter, limits: EngineConfig
) -> GenerationRequest:
    """Two branches: the after model is alpha 0, the before model alpha -1."""
    branches = (Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0))
    return _generation(request, branches, generation_id, prompter, limits)


def score(request: pb.ScoreRequest, generation_id: str, prompter: Prompter, limits: EngineConfig) -> ScoreRequest:
    """Teacher forcing: the continuation is tokenized on its own, so its ids do not depend on the prompt."""
    alpha = request.alpha if request.HasField("alpha") else DEFAULT_ALPHA
    _check_alpha(alpha, "alpha", limits)
    _check_alphas(request.score_alphas, "score_alphas", limits)
    return ScoreRequest(
        request_id=generation_id,
        prompt_ids=_prompt_ids(request.prompt, prompter),
        continuation_ids=_continuation_ids(request.continuation, prompter),
        alpha=alpha,
        top_candidates=request.top_candidates,
        score_alphas=tuple(request.score_alphas),
    )


def _generation(
    request: pb.GenerateLDARequest | pb.GenerateBothRequest,
    branches: tuple[Branch, ...],
    generation_id: str,
    prompter: Prompter,
    limits: EngineConfig,
) -> GenerationRequest:
    num_sequences = request.num_sequences if request.HasField("num_sequences") else 1
    _check_limit(num_sequences, limits.max_sequences_per_request, "num_sequences")
    stopping, output = _stopping(request.stopping, limits), _output(request.output, limits)
    return GenerationRequest(
        request_id=generation_id,
        prompt_ids=_prompt_ids(request.prompt, prompter),
        branches=branches,
        num_sequences=num_sequences,
        sampling=_sampling(request.sampling),
        stopping=stopping,
        output=output,
    )


def _sampling(message: pb.Sampling) -> Sampling:
    unset = Sampling()
    return Sampling(
        temperature=message.temperature if message.HasField("temperature") else unset.temperature,
        top_p=message.top_p if message.HasField("top_p") else unset.top_p,
        top_k=message.top_k if message.HasField("top_k") else unset.top_k,
        min_p=message.min_p if message.HasField("min_p") else unset.min_p,
        plausibility=message.plausibility if message.HasField("plausibility") else unset.plausibility,
        seed=message.seed if message.HasField("seed") else secrets.randbits(64),
    )


def _stopping(message: pb.Stopping, limits: EngineConfig) -> Stopping:
    if message.HasField("max_new_tokens"):
        max_new_tokens = message.max_new_tokens
        _check_limit(max_new_tokens, limits.max_new_tokens, "stopping.max_new_tokens")
    else:
        max_new_tokens = min(Stopping().max_new_tokens, limits.max_new_tokens)
    if message.min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            f"stopping.min_new_tokens must not be above max_new_tokens, which is {max_new_tokens}.",
            field="stopping.min_new_tokens",
        )
    return Stopping(
        max_new_tokens=max_new_tokens,
        min_new_tokens=message.min_new_tokens,
        ignore_eos=message.ignore_eos,
        stop_strings=tuple(message.stop_strings),
        stop_token_ids=tuple(message.stop_token_ids),
        time_budget_s=seconds(message.time_budget) if message.HasField("time_budget") else None,
    )


def _output(message: pb.OutputOptions, limits: EngineConfig) -> Output:
    _check_alphas(message.score_alphas, "output.score_alphas", limits)
    if message.HasField("max_event_delay") and seconds(message.max_event_delay) < 0:
        raise InvalidRequest("output.max_event_delay must not be negative.", field="output.max_event_delay")
    return Output(
        diagnostics=message.diagnostics,
        top_candidates=message.top_candidates,
        score_alphas=tuple(message.score_alphas),
    )


def _prompt_ids(prompt: pb.Prompt, prompter: Prompter) -> tuple[int, ...]:
    form = prompt.WhichOneof("form")
    if form == "chat":
        turns = [(message.role, message.content) for message in prompt.chat.messages]
        ids = prompter.chat(turns, prompt.chat.continue_final_message)
    else:
        ids = prompter.text(prompt.text) if form == "text" else tuple(prompt.tokens.ids)
    return _not_empty(ids, "prompt")


def _continuation_ids(continuation: pb.Prompt, prompter: Prompter) -> tuple[int, ...]:
    form = continuation.WhichOneof("form")
    if form == "chat":
        raise InvalidRequest("A continuation is text or token ids, not a conversation.", field="continuation")
    ids = prompter.continuation(continuation.text) if form == "text" else tuple(continuation.tokens.ids)
    return _not_empty(ids, "continuation")


def _not_empty(ids: tuple[int, ...], field: str) -> tuple[int, ...]:
    if not ids:
        raise PromptUnusable(f"The {field} renders to no tokens; send some text.", field=field)
    return ids


def _check_limit(value: int, limit: int, field: str) -> None:
    if value > limit:
        raise _over_limit(f"{field} must be at most {limit} on this server.", field, f"{limit}")


def _check_alphas(alphas: Sequence[float], field: str, limits: EngineConfig) -> None:
    for index, alpha in enumerate(alphas):
        _check_alpha(alpha, f"{field}[{index}]", limits)


def _check_alpha(alpha: float, field: str, limits: EngineConfig) -> None:
    low, high = limits.min_alpha, limits.max_alpha
    if not low <= alpha <= high:
        sentence = f"{field} must be between {low:g} and {high:g} on this server."
        raise _over_limit(sentence, field, f"{low if alpha < low else high:g}")


def _over_limit(sentence: str, field: str, limit: str) -> RequestError:
    return LimitExceeded(sentence, field=field, metadata={"field": field, "limit": limit})


def started(request: GenerationRequest, pair: PairInfo, queue_s: float) -> pb.Started:
    """The first event: what is in force. A request with two branches has no alpha of its own."""
    alpha = request.branches[0].alpha if len(request.branches) == 1 else None
    return pb.Started(
        generation_id=request.request_id,
        prompt_token_count=len(request.prompt_ids),
        seed=request.sampling.seed,
        alpha=alpha,
        pair_fingerprint=pair.fingerprint,
        queue_time=duration(queue_s),
        sequence_count=len(request.branches) * request.num_sequences,
    )


def write_delta(event: SequenceDelta, message: pb.TokenDelta) -> None:
    """New tokens, written into the message that holds them: a copy would cost twice as much, for every token."""
    message.sequence_index = event.sequence_index
    message.role = ROLES[event.role]
    message.text = event.text
    for token in event.tokens:
        _write_token(token, message.tokens.add())


def finished(event: SequenceFinished, request: GenerationRequest) -> pb.Finished:
    """The end of a sequence."""
    message = pb.Finished(
        sequence_index=event.sequence_index,
        role=ROLES[event.role],
        reason=REASONS[event.reason],
        usage=pb.Usage(
            prompt_token_count=len(request.prompt_ids),
            output_token_count=event.output_tokens,
            prefill_time=duration(event.prefill_s),
            decode_time=duration(event.decode_s),
        ),
        alpha_scores=_alpha_scores(request.output.score_alphas, event.alpha_scores),
    )
    if event.stop_string is not None:
        message.stop_string = event.stop_string
    elif event.stop_token_id is not None:
        message.stop_token_id = event.stop_token_id
    return message


def score_block(event: ScoreBlock, request: ScoreRequest) -> pb.ScoreResponse:
    """Scored positions."""
    message = pb.ScoreResponse(
        offset=event.offset,
        total_token_count=event.total_tokens,
        alpha_scores=_alpha_scores(request.score_alphas, event.alpha_scores),
    )
    for token in event.tokens:
        _write_token(token, message.tokens.add())
    return message


def _alpha_scores(alphas: Iterable[float], logprobs: Iterable[float]) -> Iterable[pb.AlphaScore]:
    return (pb.AlphaScore(alpha=alpha, logprob=logprob) for alpha, logprob in zip(alphas, logprobs, strict=False))


def _write_token(token: EngineToken, message: pb.Token) -> None:
    message.id = token.token_id
    message.piece = token.piece
    if token.logprob is not None:
        message.logprob = token.logprob
    if token.diagnostics is not None:
        message.diagnostics.CopyFrom(_diagnostics(token.diagnostics))


def _diagnostics(diagnostics: Diagnostics) -> pb.TokenDiagnostics:
    return pb.TokenDiagnostics(
        after_logprob=diagnostics.after_logprob,
        before_logprob=diagnostics.before_logprob,
        amplified_logprob=diagnostics.amplified_logprob,
        after_rank=diagnostics.after_rank,
        before_rank=diagnostics.before_rank,
        amplified_rank=diagnostics.amplified_rank,
        after_before_kl=diagnostics.after_before_kl,
        novel_mass=diagnostics.novel_mass,
        critical_alpha=diagnostics.critical_alpha,
        critical_token_id=diagnostics.critical_token_id,
        critical_piece=diagnostics.critical_piece,
        candidates=map(_candidate, diagnostics.candidates),
    )


def _candidate(candidate: Candidate) -> pb.Candidate:
    return pb.Candidate(
        id=candidate.token_id,
        piece=candidate.piece,
        amplified_logprob=candidate.amplified_logprob,
        after_logprob=candidate.after_logprob,
        before_logprob=candidate.before_logprob,
    )


def model_pair(pair: PairInfo, limits: EngineConfig, admission: AdmissionConfig) -> pb.GetModelPairResponse:
    """Who is loaded, what is allowed, what is the default."""
    return pb.GetModelPairResponse(
        after=_model(pair.after),
        before=_model(pair.before),
        limits=pb.Limits(
            max_context_tokens=pair.context_tokens,
            max_new_tokens=limits.max_new_tokens,
            max_running_sequences=limits.max_running_sequences,
            max_queued_requests=limits.max_queued_requests,
            min_alpha=limits.min_alpha,
            max_alpha=limits.max_alpha,
            max_sequences_per_request=limits.max_sequences_per_request,
            max_queued_tokens=admission.max_queued_tokens,
            max_requests_per_caller=admission.max_requests_per_caller,
        ),
        server_version=__version__,
        defaults=defaults(limits),
        pair_fingerprint=pair.fingerprint,
        has_chat_template=pair.has_chat_template,
        device=pair.device,
    )


def load(engine: Load, admission: Admission, limits: EngineConfig, *, accepts_work: bool) -> pb.GetLoadResponse:
    """How busy the server is."""
    wait_s = admission.expected_wait_s()
    held = engine.pages_total - engine.pages_free
    return pb.GetLoadResponse(
        running_sequences=engine.running_sequences,
        max_running_sequences=limits.max_running_sequences,
        waiting_requests=admission.waiting_requests,
        waiting_tokens=admission.waiting_tokens,
        expected_wait=None if wait_s is None else duration(wait_s),
        kv_cache_usage=held / engine.pages_total if engine.pages_total else 0.0,
        open_requests=admission.open_requests,
        accepts_work=accepts_work,
    )


def _model(model: ModelInfo) -> pb.Model:
    return pb.Model(
        model_id=model.model_id,
        revision=model.revision,
        dtype=model.dtype,
        vocab_size=model.vocab_size,
        architecture=model.architecture,
        parameter_count=model.parameter_count,
        context_tokens=model.context_tokens,
    )


def compatibility(report: CompatibilityReport) -> pb.TokenizerCompatResponse:
    """The vocabulary report; the fields have the same names on both sides."""
    return pb.TokenizerCompatResponse(
        compatible=report.compatible,
        after_vocab_size=report.after_vocab_size,
        before_vocab_size=report.before_vocab_size,
        vocabularies_equal=report.vocabularies_equal,
        conflicts=[
            pb.VocabularyConflict(piece=conflict.piece, after_id=conflict.after_id, before_id=conflict.before_id)
            for conflict in report.conflicts
        ],
        after_vocab_sha256=report.after_vocab_sha256,
        before_vocab_sha256=report.before_vocab_sha256,
        conflict_count=report.conflict_count,
        shared_id_count=report.shared_id_count,
        after_only_ids=report.after_only_ids,
        before_only_ids=report.before_only_ids,
        after_padded_row_count=report.after_padded_row_count,
        before_padded_row_count=report.before_padded_row_count,
        special_token_differences=[
            pb.SpecialTokenDifference(name=each.name, after_token=each.after_token, before_token=each.before_token)
            for each in report.special_token_differences
        ],
        after_eos_ids=report.after_eos_ids,
        before_eos_ids=report.before_eos_ids,
        chat_templates_equal=report.chat_templates_equal,
        verdict=report.verdict,
    )


def duration(seconds_: float) -> Duration:
    """Seconds as a protobuf duration; never negative."""
    nanos = max(0, round(seconds_ * 1e9))
    return Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def seconds(message: Duration) -> float:
    """A protobuf duration as seconds."""
    return message.seconds + message.nanos / 1e9
