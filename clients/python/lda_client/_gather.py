"""The grammar of the streams, and what a whole stream adds up to.

    generate        started (delta)* finished{started.sequence_count}, then OK
    score           blocks that follow on one another up to the announced total, then OK

Knows events only: nothing of calls, channels, asyncio or errors of the wire. A stream that breaks the grammar raises
`StreamBroken`. An event of a kind that only a newer contract knows is none of ours, see `is_known`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, TypeVar, overload

from lda_client._errors import StreamBroken
from lda_client._html import completion_html, completions_html, scored_html
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

GenerateEvent: TypeAlias = "pb.GenerateLDAResponse | pb.GenerateBothResponse"
GenerateEventT = TypeVar("GenerateEventT", pb.GenerateLDAResponse, pb.GenerateBothResponse)
EventT_contra = TypeVar("EventT_contra", contravariant=True)
ResultT_co = TypeVar("ResultT_co", covariant=True)
_Key: TypeAlias = "tuple[pb.ModelRole.ValueType, int]"


class TextPiece(NamedTuple):
    """Text of one sequence as it arrived: whole characters, never empty."""

    sequence_index: int
    role: pb.ModelRole.ValueType
    text: str


@dataclass(frozen=True)
class Completion:
    """One finished sequence.

    Attributes:
        sequence_index: which sequence; counts from 0, for each role on its own.
        role: which distribution drew it.
        text: its text, without the stop string.
        tokens: its tokens, with log-probabilities and diagnostics as asked for.
        finish_reason: why it ended.
        matched_stop: the stop string or stop token that matched; None if none did.
        alpha_scores: log q_alpha of the whole sequence in nats, for each of `score_alphas` as the caller wrote it.
        usage: what it cost.
    """

    sequence_index: int
    role: pb.ModelRole.ValueType
    text: str
    tokens: list[pb.Token]
    finish_reason: pb.FinishReason.ValueType
    matched_stop: str | int | None
    alpha_scores: dict[float, float]
    usage: pb.Usage

    @property
    def reason_name(self) -> str:
        """The finish reason in words of the contract, such as `EOS` or `MAX_TOKENS`."""
        return reason_name(self.finish_reason)

    @property
    def role_name(self) -> str:
        """The role in words of the contract: `AFTER`, `BEFORE` or `AMPLIFIED`."""
        return role_name(self.role)

    def _repr_html_(self) -> str:
        """For notebooks: the text, its tokens tinted by how far the two models are apart if there are diagnostics."""
        return completion_html(self)


@dataclass(frozen=True)
class Completions(Sequence[Completion]):
    """Every sequence of one generation, ordered by role and index; a sequence of `Completion`.

    Attributes:
        started: the first event: generation id, seed and alpha in force, prompt length.
        items: the completions.
        as_finished: the same in the order in which they finished.
    """

    started: pb.Started
    items: tuple[Completion, ...]
    as_finished: tuple[Completion, ...] = field(repr=False)

    @overload
    def __getitem__(self, index: int) -> Completion: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Completion, ...]: ...
    def __getitem__(self, index: int | slice) -> Completion | tuple[Completion, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def of_role(self, role: pb.ModelRole.ValueType) -> list[Completion]:
        """The completions one model drew, such as `pb.MODEL_ROLE_BEFORE`, by index."""
        return [item for item in self.items if item.role == role]

    def _repr_html_(self) -> str:
        """For notebooks: every completion as it shows itself."""
        return completions_html(self)


@dataclass(frozen=True)
class ScoredText:
    """A continuation scored at every position.

    Attributes:
        tokens: its tokens, each with diagnostics.
        alpha_scores: log q_alpha of the whole continuation in nats, for each of `score_alphas` as the caller wrote it.
    """

    tokens: list[pb.Token]
    alpha_scores: dict[float, float]

    @property
    def after_logprob(self) -> float:
        """Log-probability of the whole continuation under the post-trained model, in nats."""
        return sum(token.diagnostics.after_logprob for token in self.tokens)

    @property
    def before_logprob(self) -> float:
        """Log-probability of the whole continuation under the reference model, in nats."""
        return sum(token.diagnostics.before_logprob for token in self.tokens)

    @property
    def amplified_logprob(self) -> float:
        """Log-probability of the whole continuation under the amplified distribution, in nats."""
        return sum(token.diagnostics.amplified_logprob for token in self.tokens)

    def _repr_html_(self) -> str:
        """For notebooks: the tokens, tinted by how far the two models are apart."""
        return scored_html(self)


class Reader(Protocol[EventT_contra, ResultT_co]):
    """Follows a stream event by event, and adds up what is given to `add`."""

    begun: bool
    score_alphas: tuple[float, ...]

    def observe(self, event: EventT_contra) -> None:
        """Check one event against the grammar. Raises StreamBroken."""

    def end(self) -> None:
        """Check that the stream may end here with OK. Raises StreamBroken."""

    def add(self, event: EventT_contra) -> None:
        """Keep what this event brings; an event that is only observed is not kept."""

    def result(self) -> ResultT_co:
        """What the added events come to, once the stream has ended."""


@dataclass
class _Sequence:
    """One sequence while it grows."""

    text: list[str] = field(default_factory=list)
    tokens: list[pb.Token] = field(default_factory=list)
    finished: pb.Finished = field(default_factory=pb.Finished)


class GenerateReader:
    """`started (delta)* finished{n}`; sequences may come interleaved.

    Args:
        sequences: how many were asked for; it counts where the server does not announce how many will come.
        score_alphas: the alphas asked for, as the caller wrote them.
    """

    def __init__(self, sequences: int, score_alphas: Sequence[float] = ()) -> None:
        self.started: pb.Started | None = None
        self.begun = False
        self._expected = sequences
        self.score_alphas = tuple(score_alphas)
        self._running: set[_Key] = set()
        self._finished: set[_Key] = set()
        self._gathered: dict[_Key, _Sequence] = {}
        self._order: list[_Key] = []

    def observe(self, event: GenerateEvent) -> None:
        """Check one event against the grammar. Raises StreamBroken."""
        match event.WhichOneof("event"):
            case "started":
                _check(self.started is None, "it sent `started` twice")
                self.started = event.started
                self._expected = event.started.sequence_count or self._expected
            case "delta":
                self._check_running(event.delta)
                self._running.add(_key(event.delta))
            case "finished":
                self._check_running(event.finished)
                self._running.discard(_key(event.finished))
                self._finished.add(_key(event.finished))
                _check(len(self._finished) <= self._expected, f"more than {self._expected} sequences finished")

    def _check_running(self, event: pb.TokenDelta | pb.Finished) -> None:
        self.begun = True
        _check(self.started is not None, "it did not begin with `started`")
        _check(event.sequence_index < self._expected, f"sequence {event.sequence_index} was never announced")
        _check(_key(event) not in self._finished, f"sequence {event.sequence_index} went on after it had finished")

    def end(self) -> None:
        """Check that every sequence has finished. Raises StreamBroken."""
        _check(self.started is not None, "it ended before `started`")
        finished = len(self._finished)
        _check(finished == self._expected, f"it ended when {finished} of {self._expected} sequences had finished")
        _check(not self._running, "it ended before every sequence had finished")

    def add(self, event: GenerateEvent) -> None:
        """Keep what this event brings to its sequence."""
        match event.WhichOneof("event"):
            case "delta":
                sequence = self._gathered.setdefault(_key(event.delta), _Sequence())
                sequence.text.append(event.delta.text)
                sequence.tokens.extend(event.delta.tokens)
            case "finished":
                self._gathered.setdefault(_key(event.finished), _Sequence()).finished = event.finished
                self._order.append(_key(event.finished))

    def result(self) -> Completions:
        """Every sequence whole."""
        whole = {key: self.completion(self._gathered[key].finished) for key in self._order}
        in_order = tuple(whole[key] for key in sorted(whole))
        return Completions(self.started or pb.Started(), in_order, tuple(whole.values()))

    def completion(self, finished: pb.Finished) -> Completion:
        """The sequence that ended with this event, which was added."""
        sequence = self._gathered[_key(finished)]
        return Completion(
            sequence_index=finished.sequence_index,
            role=finished.role,
            text="".join(sequence.text),
            tokens=sequence.tokens,
            finish_reason=finished.reason,
            matched_stop=matched_stop(finished),
            alpha_scores=alpha_scores(finished.alpha_scores, self.score_alphas),
            usage=finished.usage,
        )

    def take(self, finished: pb.Finished) -> Completion:
        """The same, and forget it: for streams that are too long to keep."""
        completion = self.completion(finished)
        del self._gathered[_key(finished)]
        return completion

    def take_unfinished(self) -> list[Completion]:
        """What there is of the sequences that have not finished."""
        return [self.take(pb.Finished(role=role, sequence_index=index)) for role, index in sorted(self._gathered)]


class ScoreReader:
    """Blocks without gaps, up to the total that each of them announces."""

    def __init__(self, score_alphas: Sequence[float] = ()) -> None:
        self.begun = False
        self.score_alphas = tuple(score_alphas)
        self._scored = 0
        self._total = 0
        self._blocks: list[pb.ScoreResponse] = []

    def observe(self, event: pb.ScoreResponse) -> None:
        """Check one block against the grammar. Raises StreamBroken."""
        self.begun = True
        _check(event.offset == self._scored, f"a block begins at token {event.offset}, not at {self._scored}")
        self._scored += len(event.tokens)
        self._total = event.total_token_count

    def end(self) -> None:
        """Check that every token was scored. Raises StreamBroken."""
        _check(self.begun, "it ended before its first block")
        _check(self._scored == self._total, f"it ended when {self._scored} of {self._total} tokens were scored")

    def add(self, event: pb.ScoreResponse) -> None:
        """Keep one block."""
        self._blocks.append(event)

    def result(self) -> ScoredText:
        """The whole continuation."""
        tokens = [token for block in self._blocks for token in block.tokens]
        scores = [score for block in self._blocks for score in block.alpha_scores]
        return ScoredText(tokens, alpha_scores(scores, self.score_alphas))


def is_known(event: Message) -> bool:
    """Whether this client knows anything of what the event brings; a newer server may send what it does not."""
    return bool(event.ListFields())


def _key(event: pb.TokenDelta | pb.Finished) -> _Key:
    return event.role, event.sequence_index


def _check(holds: bool, finding: str) -> None:
    if not holds:
        raise StreamBroken(f"The stream broke its contract: {finding}. Server and client may be of different versions.")


def text_piece(event: GenerateEvent) -> TextPiece | None:
    """The text an event brings, if it brings any."""
    if event.WhichOneof("event") != "delta" or not event.delta.text:
        return None
    return TextPiece(event.delta.sequence_index, event.delta.role, event.delta.text)


def matched_stop(finished: pb.Finished) -> str | int | None:
    """The stop string or stop token that matched; None if none did."""
    match finished.WhichOneof("matched_stop"):
        case "stop_string":
            return finished.stop_string
        case "stop_token_id":
            return finished.stop_token_id
    return None


def alpha_scores(scores: Sequence[pb.AlphaScore], asked: Sequence[float]) -> dict[float, float]:
    """Log-probabilities by alpha. The wire rounds alphas to 32 bits; the keys are the caller's own numbers."""
    alphas = asked if len(asked) == len(scores) else [score.alpha for score in scores]
    return {alpha: score.logprob for alpha, score in zip(alphas, scores, strict=True)}


def reason_name(reason: pb.FinishReason.ValueType) -> str:
    """A finish reason in words of the contract, such as `EOS` or `MAX_TOKENS`."""
    return _bare_name(pb.FinishReason.items(), "FINISH_REASON_", reason)


def role_name(role: pb.ModelRole.ValueType) -> str:
    """A role in words of the contract: `AFTER`, `BEFORE` or `AMPLIFIED`."""
    return _bare_name(pb.ModelRole.items(), "MODEL_ROLE_", role)


def _bare_name(items: Iterable[tuple[str, int]], prefix: str, value: int) -> str:
    """The name of an enum value without its prefix; the number for one that only a newer server knows."""
    return next((name.removeprefix(prefix) for name, number in items if number == value), str(value))
