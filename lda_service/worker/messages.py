"""What crosses the pipe between the server process and the worker process, both ways.

Plain data, drained at the step boundary: a new request, a cancel and a shutdown are the same kind of thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lda_service.engine.request import GenerationRequest, ScoreBlock, ScoreRequest, SequenceFinished

if TYPE_CHECKING:
    from lda_service.engine.request import Event, Load
    from lda_service.errors import LdaError
    from lda_service.pair_info import PairInfo


@dataclass(frozen=True, slots=True)
class Submit:
    """To the worker: start this request. Answered by events; a bad request by `RequestFailed`."""

    request: GenerationRequest | ScoreRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the worker: free this request's rows and pages at the next step. Not answered."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """To the worker: end the process. Running requests are ended with `Aborted`."""


@dataclass(frozen=True, slots=True)
class Ping:
    """To the worker: answered by `Pong` between two steps. One that does not answer is stuck."""


Inbound = Submit | Cancel | Shutdown | Ping


@dataclass(frozen=True, slots=True)
class Ready:
    """From the worker, once: both models are loaded and a warm-up generation has run."""

    pair: PairInfo


@dataclass(frozen=True, slots=True)
class StartFailed:
    """From the worker, instead of `Ready`; the process ends after it."""

    error: LdaError


@dataclass(frozen=True, slots=True)
class EventBatch:
    """From the worker, once per step: everything that happened, in order."""

    events: tuple[Event, ...]
    load: Load


@dataclass(frozen=True, slots=True)
class Pong:
    """From the worker: it is alive."""


Outbound = Ready | StartFailed | EventBatch | Pong


def sequences_of(request: GenerationRequest | ScoreRequest) -> int:
    """How many ends (`ends_sequence`) a request owes; a scored text counts as one sequence."""
    return len(request.branches) * request.num_sequences if isinstance(request, GenerationRequest) else 1


def ends_sequence(event: Event) -> bool:
    """Whether this event is the last of its sequence. `RequestFailed` ends the whole request instead."""
    return isinstance(event, SequenceFinished) or (isinstance(event, ScoreBlock) and event.is_last)
