"""Who may come in: counts of what waits, of what each caller has open, and a forecast of the wait.

Pure: told what comes and goes, and what time it is. Knows neither gRPC nor the event loop. All
refusals happen here, before a call has sent anything, so that a proxy may try another server.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lda_service.engine.request import GenerationRequest
from lda_service.errors import CallerLimit, DeadlineTooShort, QueueFull
from lda_service.worker.messages import sequences_of

if TYPE_CHECKING:
    from lda_service.config import AdmissionConfig, EngineConfig
    from lda_service.engine.request import ScoreRequest

MEMORY_S = 60.0  # of busy time: how far back the rate of ends looks
BUSY_TIME_MIN_S = 0.5


def tokens_of(request: GenerationRequest | ScoreRequest) -> int:
    """Tokens a request asks for: its prompt, and the new tokens of every sequence."""
    if isinstance(request, GenerationRequest):
        return len(request.prompt_ids) + sequences_of(request) * request.stopping.max_new_tokens
    return len(request.prompt_ids) + len(request.continuation_ids)


class EndRate:
    """Rows that become free per second of busy time, recent ones counting most."""

    def __init__(self) -> None:
        self._freed = 0.0
        self._busy_s = 0.0
        self._at: float | None = None  # up to when time was counted; None while idle

    def follow(self, now: float, *, busy: bool) -> None:
        """Time has passed; from now on the engine is busy, or not."""
        if self._at is not None:
            keep = math.exp((self._at - now) / MEMORY_S)
            self._freed *= keep
            self._busy_s = self._busy_s * keep + now - self._at
        self._at = now if busy else None

    def freed(self, rows: int) -> None:
        """The sequences in that many rows ended, or were ended."""
        self._freed += rows

    @property
    def per_s(self) -> float | None:
        """The rate; None while too little was seen."""
        return self._freed / self._busy_s if self._busy_s >= BUSY_TIME_MIN_S and self._freed > 0 else None


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place, from submission to its end."""

    caller: str
    tokens: int
    sequences: int  # that have not ended; counted down
    is_waiting: bool = True  # until its first sequence runs


class Admission:
    """Keeps the places. `admit`, then `started` when the first sequence runs, then `close` in any case.

    Args:
        engine: what runs at once, and how many requests may wait.
        limits: what else is limited.
    """

    def __init__(self, engine: EngineConfig, limits: AdmissionConfig) -> None:
        self._rows = engine.max_running_sequences
        self._max_requests = engine.max_queued_requests
        self._limits = limits
        self._open: set[Ticket] = set()
        self._by_caller: Counter[str] = Counter()
        self._rate = EndRate()
        self._sequences = 0  # of all open requests
        self.waiting_requests = 0
        self.waiting_tokens = 0

    @property
    def open_requests(self) -> int:
        """Requests in any state."""
        return len(self._open)

    def admit(
        self,
        request: GenerationRequest | ScoreRequest,
        caller: str,
        remaining_s: float | None,
        now: float,
    ) -> Ticket:
        """A place in the queue.

        Args:
            request: what is asked for.
            caller: who asks.
            remaining_s: until the caller's deadline; None if it has none.
            now: monotonic seconds.

        Raises:
            CallerLimit: this caller has enough open.
            QueueFull: too many requests or tokens wait.
            DeadlineTooShort: it would wait longer than it has time.
        """
        ticket = Ticket(caller, tokens_of(request), sequences_of(request))
        self._check_caller(caller)
        self._check_queue(ticket.tokens)
        self._check_deadline(remaining_s)
        self._open.add(ticket)
        self._by_caller[caller] += 1
        self._sequences += ticket.sequences
        self._count(ticket, 1)
        self._rate.follow(now, busy=True)
        return ticket

    def started(self, ticket: Ticket, now: float) -> None:
        """The first sequence runs: nothing waits any more."""
        if ticket.is_waiting:
            ticket.is_waiting = False
            self._count(ticket, -1)
        self._rate.follow(now, busy=True)

    def ended(self, ticket: Ticket, now: float) -> None:
        """One of its sequences ended by itself; read late, it may be of a request that is over."""
        if ticket not in self._open:
            return
        ticket.sequences -= 1
        self._sequences -= 1
        self._rate.follow(now, busy=True)
        self._rate.freed(1)

    def close(self, ticket: Ticket, now: float) -> None:
        """The request is over, however it ended."""
        if ticket not in self._open:
            return
        self._open.remove(ticket)
        self._sequences -= ticket.sequences
        self._by_caller[ticket.caller] -= 1
        if not self._by_caller[ticket.caller]:
            del self._by_caller[ticket.caller]
        self._rate.follow(now, busy=True)
        if ticket.is_waiting:
            self._count(ticket, -1)
        else:
            self._rate.freed(min(ticket.sequences, self._rows))
        self._rate.follow(now, busy=bool(self._open))

    def expected_wait_s(self) -> float | None:
        """How long a request that came now would wait for its first row; None while that is not known."""
        ends_needed = self._sequences + 1 - self._rows
        if ends_needed <= 0:
            return 0.0
        return None if self._rate.per_s is None else ends_needed / self._rate.per_s

    def _check_caller(self, caller: str) -> None:
        limit = self._limits.max_requests_per_caller
        if limit and self._by_caller[caller] >= limit:
            raise CallerLimit(
                f"{self._by_caller[caller]} requests of this caller are open, and {limit} may be; wait for one to end.",
                metadata={"open": str(self._by_caller[caller]), "limit": str(limit)},
                retry_after_s=1.0,
            )

    def _check_queue(self, tokens: int) -> None:
        limit = self._limits.max_queued_tokens
        if self.waiting_requests >= self._max_requests:
            depth, capacity, what = self.waiting_requests, self._max_requests, "requests"
        elif limit and self.waiting_requests and self.waiting_tokens + tokens > limit:
            depth, capacity, what = self.waiting_tokens, limit, "tokens"
        else:
            return
        wait_s = self.expected_wait_s()
        raise QueueFull(
            f"The queue is full: {depth} {what} wait, and {capacity} may; try again later or elsewhere.",
            metadata={"depth": str(depth), "capacity": str(capacity)},
            retry_after_s=min(max(wait_s or 1.0, 1.0), 60.0),
        )

    def _check_deadline(self, remaining_s: float | None) -> None:
        wait_s = self.expected_wait_s()
        if remaining_s is None or wait_s is None or wait_s <= remaining_s:
            return
        raise DeadlineTooShort(
            f"The expected wait is {wait_s:.1f} s and the call has {remaining_s:.1f} s left; allow more time, or try "
            "another server.",
            metadata={"expected_wait_ms": f"{wait_s * 1000:.0f}", "remaining_ms": f"{remaining_s * 1000:.0f}"},
            retry_after_s=min(wait_s, 60.0),
        )

    def _count(self, ticket: Ticket, sign: int) -> None:
        self.waiting_requests += sign
        self.waiting_tokens += sign * ticket.tokens
