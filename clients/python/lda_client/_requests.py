"""Keyword arguments in the contract's names, turned into request messages.

What the caller leaves out, or gives as None, stays unset on the wire, where it means the default of the server. Knows
the messages only: nothing of channels, and nothing of whether the pair has a chat template (see `prefers_chat`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from lda_client.gen.lda.v1 import lda_service_pb2 as pb

Turn: TypeAlias = "Mapping[str, str] | tuple[str, str] | pb.ChatMessage"
ContinuationLike: TypeAlias = "str | Sequence[int] | pb.TokenIds | pb.Prompt"
PromptLike: TypeAlias = "str | Sequence[Turn] | Sequence[int] | pb.TokenIds | pb.Chat | pb.Prompt"

MessageT = TypeVar("MessageT", bound=Message)


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of every generation: how to draw, when to stop, what to send.

    Each may be left out, or None: the server default then holds, which `model_pair().defaults` reports.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass; the token that crosses it is kept.
        top_k: most likely tokens kept; 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one; 0 keeps all.
        plausibility: keep tokens with p_after >= plausibility * max p_after; 0 keeps all.
        seed: base seed; the server draws one unless given, and echoes it in `started`.
        max_new_tokens: cap on new tokens of a sequence.
        min_new_tokens: no end-of-sequence token is drawn before this many.
        ignore_eos: go on after end-of-sequence tokens.
        stop: a string, or several, that end a sequence; they are not part of the text.
        stop_token_ids: tokens that end a sequence.
        time_budget_s: decoding seconds after which a sequence ends early, without an error.
        diagnostics: compare the two models at every token.
        top_candidates: alternatives per position, 50 at most.
        max_tokens_per_event: tokens put in one event at most; 1 unless given.
        max_event_delay_s: longest a token waits for company, in seconds.
        score_alphas: alphas at which every finished sequence is scored, in the same pass.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    plausibility: float | None
    seed: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    ignore_eos: bool | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    time_budget_s: float | None
    diagnostics: bool | None
    top_candidates: int | None
    max_tokens_per_event: int | None
    max_event_delay_s: float | None
    score_alphas: Sequence[float] | None


class GenerateBothOptions(SamplingOptions, total=False):
    """Keyword arguments of `generate_both`: `SamplingOptions` and `num_sequences`.

    Attributes:
        num_sequences: sequences to draw (from each model); 1 unless given.
    """

    num_sequences: int | None


class GenerateOptions(GenerateBothOptions, total=False):
    """Keyword arguments of `generate` and `complete`: `GenerateBothOptions` and `alpha`.

    Attributes:
        alpha: amplification; 0 is the post-trained model itself, -1 the reference model.
    """

    alpha: float | None


def generate_request(
    prompt: pb.Prompt,
    *,
    alpha: float | None = None,
    num_sequences: int | None = None,
    **options: Unpack[SamplingOptions],
) -> pb.GenerateLDARequest:
    """Build the request of `GenerateLDA`. Raises TypeError or ValueError naming the argument at fault."""
    request = pb.GenerateLDARequest(prompt=prompt, **_generation_parts(**options))
    return _fill(request, alpha=alpha, num_sequences=num_sequences)


def generate_both_request(
    prompt: pb.Prompt, *, num_sequences: int | None = None, **options: Unpack[SamplingOptions]
) -> pb.GenerateBothRequest:
    """Build the request of `GenerateBoth`. Raises TypeError or ValueError naming the argument at fault."""
    request = pb.GenerateBothRequest(prompt=prompt, **_generation_parts(**options))
    return _fill(request, num_sequences=num_sequences)


def score_request(
    prompt: pb.Prompt,
    continuation: pb.Prompt,
    *,
    alpha: float | None = None,
    top_candidates: int | None = None,
    score_alphas: Sequence[float] | None = None,
) -> pb.ScoreRequest:
    """Build the request of `Score`. Raises TypeError or ValueError naming the argument at fault."""
    request = pb.ScoreRequest(prompt=prompt, continuation=continuation)
    return _fill(request, alpha=alpha, top_candidates=top_candidates, score_alphas=score_alphas)


class _GenerationParts(TypedDict):
    sampling: pb.Sampling | None
    stopping: pb.Stopping | None
    output: pb.OutputOptions | None


def _generation_parts(
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    plausibility: float | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int | None = None,
    ignore_eos: bool | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    time_budget_s: float | None = None,
    diagnostics: bool | None = None,
    top_candidates: int | None = None,
    max_tokens_per_event: int | None = None,
    max_event_delay_s: float | None = None,
    score_alphas: Sequence[float] | None = None,
) -> _GenerationParts:
    """The three groups of options that both generation requests share; a group nobody set is None."""
    sampling = _fill(
        pb.Sampling(),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        plausibility=plausibility,
        seed=seed,
    )
    stopping = _fill(
        pb.Stopping(),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        ignore_eos=ignore_eos,
        stop_strings=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=stop_token_ids,
        time_budget=_duration("time_budget_s", time_budget_s),
    )
    output = _fill(
        pb.OutputOptions(),
        diagnostics=diagnostics,
        top_candidates=top_candidates,
        max_tokens_per_event=max_tokens_per_event,
        max_event_delay=_duration("max_event_delay_s", max_event_delay_s),
        score_alphas=score_alphas,
    )
    return {"sampling": _if_set(sampling), "stopping": _if_set(stopping), "output": _if_set(output)}


def _fill(message: MessageT, **values: Any) -> MessageT:
    """Set the fields that are not None; an error of protobuf gets the name of the field."""
    for name, value in values.items():
        if value is None:
            continue
        try:
            message.MergeFrom(type(message)(**{name: value}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return message


def _if_set(message: MessageT) -> MessageT | None:
    return message if message.ByteSize() else None


def _duration(name: str, seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    duration = Duration()
    try:
        duration.FromTimedelta(timedelta(seconds=seconds))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from None
    return duration


def build_prompt(
    prompt: PromptLike,
    *,
    system: str | None = None,
    raw: bool = False,
    continue_final_message: bool = False,
) -> pb.Prompt:
    """Turn any form of prompt into the contract's message.

    A plain string becomes one user turn, or `Prompt.text` if `raw`; see `prefers_chat`.

    Raises:
        TypeError: for something that is no prompt.
        ValueError: for an empty sequence, or `raw`, `system` and `continue_final_message` with a form they do not fit.
    """
    form = _prompt_form(prompt, raw)
    if system is not None:
        _require(form.WhichOneof("form") == "chat", "system: goes with a conversation or a plain string, without raw.")
        form.chat.messages.insert(0, pb.ChatMessage(role="system", content=system))
    if continue_final_message:
        _require(
            form.WhichOneof("form") == "chat" and not isinstance(prompt, str),
            "continue_final_message: goes with a conversation, whose last turn is continued.",
        )
        form.chat.continue_final_message = True
    return form


def build_continuation(continuation: ContinuationLike) -> pb.Prompt:
    """The text that `Score` scores: plain text or token ids, never through a template."""
    return _prompt_form(continuation, raw=isinstance(continuation, str))


def prefers_chat(prompt: PromptLike, *, system: str | None, raw: bool) -> bool:
    """Whether it is left open how the string is sent: as a user turn if the pair has a template, else as text."""
    return isinstance(prompt, str) and not raw and system is None


def _prompt_form(prompt: Any, raw: bool) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt) if raw else pb.Prompt(chat=pb.Chat(messages=[_turn(("user", prompt))]))
    _require(not raw, "raw: goes with a plain string only.")
    match prompt:
        case pb.Prompt():
            copy = pb.Prompt()
            copy.CopyFrom(prompt)
            return copy
        case pb.Chat():
            return pb.Prompt(chat=prompt)
        case pb.TokenIds():
            return pb.Prompt(tokens=prompt)
        case bytes() | Mapping():
            raise TypeError(f"prompt: {type(prompt).__name__} is no prompt; give a string, turns or token ids.")
        case Iterable():
            return _sequence_form(list(prompt))
    raise TypeError(f"prompt: {type(prompt).__name__} is no prompt; give a string, turns or token ids.")


def _sequence_form(items: list[Any]) -> pb.Prompt:
    """A sequence of integers (numpy's too) is token ids; anything else is turns."""
    _require(bool(items), "prompt: the sequence is empty; give turns or token ids.")
    if hasattr(items[0], "__index__"):
        return pb.Prompt(tokens=_fill(pb.TokenIds(), ids=map(operator.index, items)))
    return pb.Prompt(chat=pb.Chat(messages=[_turn(item) for item in items]))


def _turn(item: Any) -> pb.ChatMessage:
    match item:
        case pb.ChatMessage():
            return item
        case {"role": str(role), "content": str(content), **others} if not others:
            return pb.ChatMessage(role=role, content=content)
        case (str(role), str(content)):
            return pb.ChatMessage(role=role, content=content)
    raise TypeError(f"prompt: {item!r} is no turn; give {{'role': ..., 'content': ...}} or (role, content).")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
