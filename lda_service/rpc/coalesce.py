"""Groups the tokens of a sequence into fewer messages, as a caller asked.

Pure: told what happened and what time it is, it says what to send. Knows neither protobuf nor the event loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lda_service.engine.request import SequenceDelta, SequenceFinished
from lda_service.worker.pending import PendingDelta

if TYPE_CHECKING:
    from lda_service.engine.request import Event, Role


class EventCoalescer:
    """Merges the deltas of each sequence up to `max_tokens` per message; a delta is never split.

    Args:
        max_tokens: tokens in one message; a single delta that holds more goes as it is.
        max_delay_s: longest time a token waits; None means until the message is full or the sequence ends.
    """

    def __init__(self, max_tokens: int = 1, max_delay_s: float | None = None) -> None:
        self._max_tokens = max_tokens
        self._max_delay_s = max_delay_s
        # By sequence, with the time since when its first token waits; oldest first.
        self._pending: dict[tuple[Role, int], tuple[PendingDelta, float]] = {}

    def take(self, event: Event | None, now: float) -> list[Event]:
        """Take an event, or None if none came in time; what to send now, in order."""
        if self._max_tokens == 1:  # nothing ever waits
            return [] if event is None else [event]
        return [*self._add(event, now), *self._due(now)]

    def _add(self, event: Event | None, now: float) -> list[Event]:
        if isinstance(event, SequenceDelta):
            return [*self._make_room(event), *self._put(event, now)]
        if isinstance(event, SequenceFinished):
            return [*self._flush((event.role, event.sequence_index)), event]
        return [] if event is None else [event]

    def _due(self, now: float) -> list[SequenceDelta]:
        """What has waited long enough."""
        if self._max_delay_s is None:
            return []
        ripe = [key for key, (_, since) in self._pending.items() if since + self._max_delay_s <= now]
        return [delta for key in ripe for delta in self._flush(key)]

    def wait_s(self, now: float) -> float | None:
        """How long until something is due; None if nothing ever is."""
        if self._max_delay_s is None or not self._pending:
            return None
        _, since = next(iter(self._pending.values()))
        return max(0.0, since + self._max_delay_s - now)

    def _make_room(self, event: SequenceDelta) -> list[SequenceDelta]:
        waiting = self._pending.get(key := (event.role, event.sequence_index))
        crowded = waiting is not None and len(waiting[0].tokens) + len(event.tokens) > self._max_tokens
        return self._flush(key) if crowded else []

    def _put(self, event: SequenceDelta, now: float) -> list[SequenceDelta]:
        key = (event.role, event.sequence_index)
        pending, _ = self._pending.setdefault(key, (PendingDelta(event), now))
        pending.add(event)
        return self._flush(key) if len(pending.tokens) >= self._max_tokens else []

    def _flush(self, key: tuple[Role, int]) -> list[SequenceDelta]:
        waiting = self._pending.pop(key, None)
        return [waiting[0].merged()] if waiting is not None else []
