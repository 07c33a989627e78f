"""The decoder on vLLM: the same requests, events and refusals as the native engine's, other rows beneath.

    step(): end what is over, give free rows to jobs in turns, let vLLM run, advance

Knows requests and text; of vLLM only the sequences of `core`. A sequence is given to vLLM when a row is free for it, so
jobs take turns whatever vLLM's queue would do. Not thread-safe: whoever owns the engine calls it from one thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lda_service.engine.checks import check_queue, check_request, not_finite
from lda_service.engine.request import (
    Admitted,
    Event,
    FinishReason,
    GenerationRequest,
    Load,
    ScoreBlock,
    ScoreRequest,
    TokenRecord,
)
from lda_service.engine.rollout import Rollout
from lda_service.engine.rows import Scoring
from lda_service.engine.warm_up import warm_up
from lda_service.vllm_engine import group
from lda_service.vllm_engine.start import explained, prepare
from lda_service.vllm_engine.wire import DrawAnswer, DrawAsk, ScoreAnswer, ScoreAsk

if TYPE_CHECKING:
    from collections.abc import Callable

    from lda_service.config import Config, EngineConfig
    from lda_service.pair_info import PairInfo
    from lda_service.vllm_engine.core import Core, Step
    from lda_service.vllm_engine.pair import PairFacts

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Job:
    """One request, and which of its sequences vLLM has."""

    request: GenerationRequest | ScoreRequest
    waiting: deque[Rollout] = field(default_factory=deque)
    running: dict[str, Rollout | None] = field(default_factory=dict)  # by sequence id; None: a scored text
    admitted_at: float | None = None
    scored: int = 0
    sums: list[float] = field(default_factory=list)
    begun: int = 0  # sequences that vLLM was ever given

    @property
    def wants_row(self) -> bool:
        """Whether something of it has not been given to vLLM."""
        return bool(self.waiting) or (isinstance(self.request, ScoreRequest) and not self.begun)


class VllmEngine:
    """See the module.

    Args:
        core: vLLM, with the pair loaded.
        facts: what is known of the pair.
        config: limits.
        clock: seconds, monotonic.
    """

    def __init__(
        self, core: Core, facts: PairFacts, config: EngineConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._core = core
        self._facts = facts
        self._config = config
        self._clock = clock
        self._shared = frozenset(facts.shared_ids)
        self._jobs: dict[str, Job] = {}
        self._job_of: dict[str, Job] = {}  # by sequence id
        self._turns: deque[Job] = deque()  # jobs with something that wants a row, whose turn is next first
        self._events: list[Event] = []
        self._reused_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._jobs) or self._core.has_work

    def load(self) -> Load:
        """How busy the engine is."""
        free, total = self._core.pages
        return Load(
            running_sequences=len(self._job_of),
            waiting_requests=self._waiting,
            pages_free=free,
            pages_total=total,
            reused_prompt_tokens=self._reused_tokens,
            preemptions=self._core.preemptions,
        )

    @property
    def _waiting(self) -> int:
        return sum(job.admitted_at is None for job in self._jobs.values())

    def submit(self, request: GenerationRequest | ScoreRequest) -> None:
        """Put a request in the queue.

        Raises:
            QueueFull: as many requests wait as may wait.
            PromptUnusable: the prompt is empty or holds ids that may not be used.
            ContextExceeded: it does not fit the context window.
        """
        check_queue(self._waiting, self._config.max_queued_requests)
        check_request(request, self._shared, self._facts.info.context_tokens)
        assert request.request_id not in self._jobs
        job = Job(request)
        if isinstance(request, GenerationRequest):
            job.waiting.extend(self._rollouts(request))
        else:
            job.sums = [0.0] * len(request.score_alphas)
        self._jobs[request.request_id] = job
        self._turns.append(job)

    def _rollouts(self, request: GenerationRequest) -> list[Rollout]:
        facts = self._facts
        longest = min(request.stopping.max_new_tokens, facts.info.context_tokens - len(request.prompt_ids))
        return [
            Rollout.begin(request, branch, index, longest, facts.pieces, facts.stop_ids)
            for index in range(request.num_sequences)
            for branch in request.branches
        ]

    def cancel(self, request_id: str) -> None:
        """Forget a request: its rows are free for the next step. Unknown ids are ignored."""
        self._events = [event for event in self._events if event.request_id != request_id]
        self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        if job is None:
            return
        self._core.abort(job.running)
        for sequence_id in job.running:
            del self._job_of[sequence_id]
        job.waiting.clear()
        job.running.clear()
        if job in self._turns:
            self._turns.remove(job)

    def step(self) -> list[Event]:
        """One step of vLLM. Returns what happened, in order."""
        self._end_expired()
        self._give_rows()
        self._advance(self._step_core())
        events, self._events = self._events, []
        return events

    def warm_up(self) -> None:
        """See `warm_up.warm_up`.

        Raises:
            ModelUnsupported: vLLM has no kernel for these models here.
        """
        with explained():
            warm_up(self, self._facts.shared_ids, self._facts.info.context_tokens)

    # Schedule -------------------------------------------------------------------------------------------------------

    def _end_expired(self) -> None:
        """End the sequences of jobs whose time budget is used up."""
        now = self._clock()
        for job in list(self._jobs.values()):
            request = job.request
            budget = request.stopping.time_budget_s if isinstance(request, GenerationRequest) else None
            if budget is None or job.admitted_at is None or now < job.admitted_at + budget:
                continue
            left = [*job.waiting, *(rollout for rollout in job.running.values() if rollout is not None)]
            for rollout in left:
                self._events += rollout.end(FinishReason.TIME_BUDGET, now, job.admitted_at)
            self._drop(request.request_id)

    def _give_rows(self) -> None:
        """Hand sequences to vLLM while rows are free; jobs take turns."""
        while self._turns and len(self._job_of) < self._config.max_running_sequences:
            job = self._turns.popleft()
            self._begin(job)
            if job.wants_row:
                self._turns.append(job)

    def _begin(self, job: Job) -> None:
        """Give vLLM the next sequence of a job."""
        request = job.request
        sequence_id = f"{request.request_id}/{job.begun}"
        job.begun += 1
        self._job_of[sequence_id] = job
        if isinstance(request, ScoreRequest):
            # The last token predicts nothing that is asked for, so it is not run; and every position must be.
            forced = request.prompt_ids + request.continuation_ids[:-1]
            scoring = Scoring(request.alpha, request.top_candidates, request.score_alphas)
            ask = ScoreAsk(scoring, len(request.prompt_ids), request.continuation_ids)
            job.running[sequence_id] = None
            self._core.add(sequence_id, forced, ask, 1, whole=True)
        else:
            rollout = job.running[sequence_id] = job.waiting.popleft()
            draw = DrawAsk(rollout.spec, len(request.prompt_ids))
            self._core.add(sequence_id, request.prompt_ids, draw, rollout.longest)

    def _step_core(self) -> Step:
        """Let vLLM run. A group in which that fails is over: a rank died, or the ranks no longer agree."""
        try:
            return self._core.step()
        except Exception:
            if not self._core.rank_sentinels:
                raise
            logger.exception("a step failed on a rank")
            group.end("vLLM's ranks failed")

    # Advance --------------------------------------------------------------------------------------------------------

    def _advance(self, step: Step) -> None:
        """Report what a step brought, and end what has come to its end."""
        now = self._clock()
        for sequence_id, found in step.started.items():
            self._admit(sequence_id, found, now)
        for sequence_id, answer in step.answers.items():
            job = self._job_of.get(sequence_id)
            if job is not None and isinstance(job.request, ScoreRequest):
                self._score(job, job.request, answer)
        for sequence_id, token in step.tokens.items():
            self._accept(sequence_id, token, step.answers.get(sequence_id), now)
        for sequence_id in step.ended:
            assert sequence_id not in self._job_of, "vLLM ended a sequence that goes on"

    def _admit(self, sequence_id: str, found: int, now: float) -> None:
        job = self._job_of.get(sequence_id)
        if job is not None and job.admitted_at is None:
            job.admitted_at = now
            self._reused_tokens += 2 * found  # each model found them
            self._events.append(Admitted(job.request.request_id))

    def _accept(self, sequence_id: str, token: int, answer: DrawAnswer | None, now: float) -> None:
        """Append a drawn token and report it; end the request if its logits were not finite."""
        job = self._job_of.get(sequence_id)
        if job is None:
            return
        rollout = job.running[sequence_id]
        if rollout is None:  # of a scored text, whose own token nobody asked for
            self._retire(sequence_id, job)
            return
        assert isinstance(answer, DrawAnswer), "a token without its answer"
        assert job.admitted_at is not None
        if not answer.sound:
            self._fail(job)
            return
        for i, value in enumerate(answer.scores):
            rollout.alpha_scores[i] += value
        record = TokenRecord(token, self._facts.pieces.piece(token), answer.logprob, answer.diagnostics)
        self._events += rollout.push(record, now, job.admitted_at)
        if rollout.has_ended:
            self._retire(sequence_id, job)

    def _fail(self, job: Job) -> None:
        request_id = job.request.request_id
        self._drop(request_id)
        self._events.append(not_finite(request_id))

    def _retire(self, sequence_id: str, job: Job) -> None:
        """Free an ended sequence's row; forget the job if nothing of it is left."""
        self._core.abort([sequence_id])  # it may have ended before its length
        del job.running[sequence_id], self._job_of[sequence_id]
        if not job.running and not job.waiting:
            self._jobs.pop(job.request.request_id, None)

    def _score(self, job: Job, request: ScoreRequest, answers: list[ScoreAnswer]) -> None:
        """Report positions of a scored text, which may come in several parts."""
        total = len(request.continuation_ids)
        for answer in answers:
            if answer.offset < job.scored:  # it was preempted, and is run again
                continue
            job.scored += len(answer.records)
            job.sums = [a + b for a, b in zip(job.sums, answer.sums, strict=True)]
            is_last = job.scored == total
            sums = tuple(job.sums) if is_last else ()
            self._events.append(ScoreBlock(request.request_id, answer.offset, answer.records, total, is_last, sums))


def load_engine(config: Config) -> tuple[VllmEngine, PairInfo]:
    """The engine over the configured pair, on the machine of rank 0; the worker's factory for `--backend vllm`.

    Raises:
        StartupError: the pair cannot be loaded, or a setting cannot be kept.
    """
    args, facts = prepare(config)
    from lda_service.vllm_engine.core import Core

    with explained():
        group.lead(config.vllm, group.digest(config, facts))
        core = Core(args)
    group.end_with_ranks(core.rank_sentinels)
    info = replace(facts.info, device=core.config.device_config.device_type)
    return VllmEngine(core, facts, config.engine), info
