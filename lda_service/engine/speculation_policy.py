"""When drafting pays: acceptance measured for each request, cost measured for each kind of step. No torch, no clock.

With k drafts of which each stands with probability a, a block gives (1 - a^k) / (1 - a) tokens. What a block and an
ordinary step cost is what they took so far; what was not measured yet is guessed from passes: k + 1 against 2.
"""

from __future__ import annotations

from dataclasses import dataclass

LENGTHS = (2, 3, 4, 6)
PROBE_LENGTH = LENGTHS[0]
# Steps after which the other kind of step is tried again, for what may have changed.
PROBE_EVERY = 64
# An ordinary step must be beaten by this much: it has no surprises.
MARGIN = 1.1
_FORGET = 0.9
_WEIGHT = 0.2


@dataclass(slots=True)
class Acceptance:
    """How often one request's drafts stand, the latest blocks counting most. Begins as if 2.4 of 3 had stood."""

    accepted: float = 2.4
    tried: float = 3.0
    idle: int = 0  # ordinary steps since the last block

    @property
    def rate(self) -> float:
        """Between 0 and 1."""
        return self.accepted / self.tried

    def record(self, accepted: int, tried: int) -> None:
        """What a block of this request came to."""
        self.accepted = _FORGET * self.accepted + accepted
        self.tried = _FORGET * self.tried + tried


def expected_tokens(rate: float, length: int) -> float:
    """Tokens that a block of `length` drafts gives on average."""
    return float(sum(rate**i for i in range(length)))


class Policy:
    """Chooses the length of the next block; 0 is an ordinary step. Seconds are running averages by rows and length."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._seen: set[tuple[int, int]] = set()
        self._blocks = 0  # since the last ordinary step

    def choose(self, requests: list[Acceptance], rows: int, room: int) -> int:
        """The length that pays for every request, at most `room`.

        Args:
            requests: the estimates of the requests that run, each once.
            rows: sequences that run.
            room: tokens that each of them may still get.
        """
        length = min(self._wanted(request, rows, room) for request in requests)
        if (rows, 0) not in self._seconds or self._blocks >= PROBE_EVERY:
            length = 0
        for request in requests:
            request.idle = 0 if length else request.idle + 1
        return length

    def record(self, rows: int, length: int, seconds: float) -> None:
        """A step with blocks of this length (0: an ordinary one) took so long."""
        self._blocks = self._blocks + 1 if length else 0
        key = rows, length
        if key not in self._seen:
            self._seen.add(key)  # the first of a shape may pay for what it sets up
            return
        known = self._seconds.get(key, seconds)
        self._seconds[key] = known + _WEIGHT * (seconds - known)

    def _wanted(self, request: Acceptance, rows: int, room: int) -> int:
        lengths = [length for length in LENGTHS if length <= room]
        if not lengths:
            return 0
        if request.idle >= PROBE_EVERY:
            return PROBE_LENGTH
        best = max(lengths, key=lambda length: self._rate(request, rows, length))
        return best if self._rate(request, rows, best) > MARGIN * self._rate(request, rows, 0) else 0

    def _rate(self, request: Acceptance, rows: int, length: int) -> float:
        """Tokens for each row and second."""
        tokens = expected_tokens(request.rate, length) if length else 1.0
        return tokens / max(self._cost(rows, length), 1e-9)

    def _cost(self, rows: int, length: int) -> float:
        """Seconds of a step; guessed from the nearest length that was measured."""
        measured = [one for count, one in self._seconds if count == rows]
        if not measured:
            return _passes(length)
        nearest = min(measured, key=lambda one: abs(one - length))
        return self._seconds[rows, nearest] * _passes(length) / _passes(nearest)


def _passes(length: int) -> int:
    return length + 1 if length else 2
