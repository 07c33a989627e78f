"""What an engine runs before it has callers, so that the first of them does not pay for it. Knows requests alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lda_service.engine.request import Branch, GenerationRequest, Role, Sampling, ScoreRequest, Stopping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lda_service.engine.request import Event


class Steps(Protocol):
    """What is needed of an engine."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def submit(self, request: GenerationRequest | ScoreRequest) -> None:
        """Queue a request."""

    def step(self) -> list[Event]:
        """Advance."""


def warm_up(engine: Steps, shared_ids: Sequence[int], context_tokens: int) -> None:
    """A short generation of every role, and a score, through the whole path.

    Args:
        engine: an idle one.
        shared_ids: ids that both models know.
        context_tokens: the longest sequence.
    """
    prompt = tuple(shared_ids[: min(8, context_tokens - 4)])
    branches = (Branch(Role.AMPLIFIED, 1.0), Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0))
    stopping = Stopping(max_new_tokens=3, ignore_eos=True)
    generation = GenerationRequest("warm-up", prompt, branches, 1, Sampling(), stopping)
    for request in (generation, ScoreRequest("warm-up-score", prompt[:1], prompt[1:])):
        engine.submit(request)  # one by one: the queue may be as short as that
        while engine.has_work:
            engine.step()
