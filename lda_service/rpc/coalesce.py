"""Groups the tokens of a sequence into fewer messages, as a caller asked.

Pure: told what happened and what time it is, it says what to send. Knows neither protobuf nor the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lda_service.engine.request import SequenceDelta, SequenceFinished

if TYPE_CHECKING:
    from lda_service.engine.request import Role, TokenRecord


@dataclass(slots=True)
class _Pending:
    """Tokens of one sequence that wait for company; `since` is when the first of them came."""

    first: SequenceDelta
    since: float
    text: list[str] = field(default_factory=list)
    tokens: list[TokenRecord] = field(default_factory=list)

    def merged(self) -> SequenceDelta:
        return replace(self.first, text="".join(self.text), tokens=tuple(self.tokens))


class EventCoalescer:
    """Merges the deltas of each sequence up to `max_tokens` per message; a delta is never split.

    Args:
        max_tokens: tokens in one message; a single delta that holds more goes as it is.
        max_delay_s: longest time a token waits; None means until the message is full or the sequence ends.
    """

    def __init__(self, max_tokens: int = 1, max_delay_s: float | None = None) -> None:
        self._max_tokens = max_tokens
        self._max_delay_s = max_delay_s
        self._pending: dict[tuple[Role, int], _Pending] = {}  # oldest first

    def add(self, event: SequenceDelta | SequenceFinished, now: float) -> list[SequenceDelta | SequenceFinished]:
        """Take an event; the events to send because of it, in order."""
        if isinstance(event, SequenceFinished):
            return [*self._flush((event.role, event.sequence_index)), event]
        if self._max_tokens == 1:
            return [event]
        return [*self._make_room(event), *self._put(event, now)]

    def due(self, now: float) -> list[SequenceDelta]:
        """What has waited long enough."""
        if self._max_delay_s is None:
            return []
        ripe = [key for key, pending in self._pending.items() if pending.since + self._max_delay_s <= now]
        return [delta for key in ripe for delta in self._flush(key)]

    def wait_s(self, now: float) -> float | None:
        """How long until something is due; None if nothing ever is."""
        if self._max_delay_s is None or not self._pending:
            return None
        oldest = next(iter(self._pending.values()))
        return max(0.0, oldest.since + self._max_delay_s - now)

    def _make_room(self, event: SequenceDelta) -> list[SequenceDelta]:
        pending = self._pending.get(key := (event.role, event.sequence_index))
        crowded = pending is not None and len(pending.tokens) + len(event.tokens) > self._max_tokens
        return self._flush(key) if crowded else []

    def _put(self, event: SequenceDelta, now: float) -> list[SequenceDelta]:
        key = (event.role, event.sequence_index)
        pending = self._pending.setdefault(key, _Pending(event, now))
        pending.text.append(event.text)
        pending.tokens += event.tokens
        return self._flush(key) if len(pending.tokens) >= self._max_tokens else []

    def _flush(self, key: tuple[Role, int]) -> list[SequenceDelta]:
        pending = self._pending.pop(key, None)
        return [pending.merged()] if pending is not None else []
