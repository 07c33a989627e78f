"""Tokens of one sequence that wait to be sent, as one event. Knows events; nothing of streams or clocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lda_service.engine.request import SequenceDelta, TokenRecord


@dataclass(slots=True)
class PendingDelta:
    """A delta that grows; `first` says whose it is."""

    first: SequenceDelta
    text: list[str] = field(default_factory=list)
    tokens: list[TokenRecord] = field(default_factory=list)

    def add(self, delta: SequenceDelta) -> None:
        """Put a later delta of the same sequence behind what is there."""
        self.text.append(delta.text)
        self.tokens += delta.tokens

    def merged(self) -> SequenceDelta:
        """All of it as one event."""
        return replace(self.first, text="".join(self.text), tokens=tuple(self.tokens))
