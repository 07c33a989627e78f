"""Which work the next step does: prompts to prefill, sequences to decode. Joining and leaving happen between steps.

A job is one request's prompt with all its sequences. Jobs wait in order of arrival; one prompt is prefilled at a time,
in chunks, while running sequences go on. A prefilled job's sequences take rows as rows and pages become free, and jobs
take turns, so that a request for a thousand rollouts does not keep others out. A sequence reserves the pages of its
longest course when it gets its row: once started, nothing is taken from it. Knows no torch, no text and no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lda_service.engine.pages import PagePool, PageTable
    from lda_service.engine.request import Branch, GenerationRequest, ScoreRequest


@dataclass(eq=False, slots=True)
class Sequence:
    """One rollout: where it stands. `row` and `table` are set by the scheduler while it runs."""

    job: Job
    branch: Branch
    index: int
    max_new_tokens: int
    needs: tuple[bool, bool] = (True, True)  # after, before
    row: int = -1  # scheduler
    table: PageTable | None = None  # scheduler
    tokens: list[int] = field(default_factory=list)  # engine
    state: Any = None  # engine: text, scores, times

    @property
    def is_running(self) -> bool:
        """Whether it holds a row."""
        return self.row >= 0

    @property
    def length(self) -> int:
        """Prompt and new tokens."""
        return len(self.job.prompt_ids) + len(self.tokens)


@dataclass(eq=False, slots=True)
class Job:
    """One request: its prompt, prefilled once for both models, and the sequences that still want a row."""

    request: GenerationRequest | ScoreRequest
    prompt_ids: tuple[int, ...]
    needs: tuple[bool, bool] = (True, True)  # after, before: what its sequences need together
    waiting: deque[Sequence] = field(default_factory=deque)
    running: int = 0  # scheduler: sequences that hold a row
    prefilled: int = 0  # scheduler: prompt positions already in both caches
    table: PageTable | None = None  # scheduler
    state: Any = None  # engine: logits after the prompt, times

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt stands in the caches."""
        return self.prefilled == len(self.prompt_ids)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Positions `start` to `stop` - 1 of a job's prompt."""

    job: Job
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work."""

    prefill: PrefillChunk | None
    decode: list[Sequence]


class Scheduler:
    """Waiting and running; admit, finish, cancel. All pages are taken and given back here."""

    def __init__(self, pool: PagePool, max_running_sequences: int, prefill_chunk_tokens: int) -> None:
        self.pool = pool
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.waiting: deque[Job] = deque()
        self.prefilling: Job | None = None
        self.ready: deque[Job] = deque()
        self.running: list[Sequence] = []
        self._free_rows = list(range(max_running_sequences - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.prefilling or self.ready or self.running)

    def fits(self, job: Job) -> bool:
        """Whether an idle engine could run the job at all."""
        longest = max((sequence.max_new_tokens for sequence in job.waiting), default=0)
        needed = self.pool.pages_for(len(job.prompt_ids)) + self.pool.pages_for(longest)
        return needed <= self.pool.num_pages

    def add(self, job: Job) -> None:
        """Put a job at the end of the queue; the caller has asked `fits`."""
        self.waiting.append(job)

    def schedule(self) -> Plan:
        """This step's prefill chunk and the sequences that decode."""
        if self.prefilling is None:
            self.prefilling = self._next_to_prefill()
        return Plan(self._next_chunk(), list(self.running))

    def _next_to_prefill(self) -> Job | None:
        """The oldest waiting job, if pages for its prompt and its first sequence are free.

        Not while a prefilled job waits for pages: prompts that pile up could starve it.
        """
        if not self.waiting or any(not self.pool.can_allocate(job.waiting[0].max_new_tokens) for job in self.ready):
            return None
        job = self.waiting[0]
        if job.waiting and not self._free_rows:
            return None
        first = job.waiting[0].max_new_tokens if job.waiting else 0
        if not self.pool.can_allocate(len(job.prompt_ids), first):
            return None
        job.table = self.pool.allocate(0, len(job.prompt_ids))
        return self.waiting.popleft()

    def _next_chunk(self) -> PrefillChunk | None:
        job = self.prefilling
        if job is None:
            return None
        stop = min(job.prefilled + self.prefill_chunk_tokens, len(job.prompt_ids))
        return PrefillChunk(job, job.prefilled, stop)

    def prefill_done(self, chunk: PrefillChunk) -> None:
        """The chunk stands in the caches. A job without sequences (a score) is over after its last chunk."""
        job = chunk.job
        assert job is self.prefilling
        assert job.prefilled == chunk.start
        job.prefilled = chunk.stop
        if job.is_prefilled:
            self.prefilling = None
            if job.waiting:
                self.ready.append(job)
            else:
                self._release(job)

    def admit(self) -> list[Sequence]:
        """Give free rows to sequences of prefilled jobs, one each in turn, as far as rows and pages go."""
        started = []
        stuck = 0
        while self.ready and self._free_rows and stuck < len(self.ready):
            job = self.ready[0]
            if self.pool.can_allocate(job.waiting[0].max_new_tokens):
                started.append(self._start(job))
                stuck = 0
            else:
                stuck += 1
            self.ready.rotate(-1)
            if not job.waiting:
                self.ready.remove(job)
        return started

    def _start(self, job: Job) -> Sequence:
        sequence = job.waiting.popleft()
        sequence.table = self.pool.allocate(len(job.prompt_ids), sequence.max_new_tokens)
        sequence.row = self._free_rows.pop()
        job.running += 1
        self.running.append(sequence)
        return sequence

    def room(self, sequence: Sequence, wanted: int) -> int:
        """How many tokens, at most `wanted`, a running sequence may get in one step: its pages hold them."""
        return min(wanted, sequence.max_new_tokens - len(sequence.tokens))

    def finish(self, sequence: Sequence) -> None:
        """The sequence ended: its row and pages are free for the next step; the prompt's too after the last one."""
        assert sequence.table is not None
        self.running.remove(sequence)
        self._free_rows.append(sequence.row)
        self.pool.release(sequence.table)
        sequence.table, sequence.row = None, -1
        job = sequence.job
        job.running -= 1
        if job.running == 0 and not job.waiting and job.table is not None:
            self._release(job)

    def drop_waiting(self, job: Job) -> list[Sequence]:
        """Take the job's sequences that have no row yet out of the queues; returns them."""
        dropped = list(job.waiting)
        job.waiting.clear()
        for queue in (self.waiting, self.ready):
            if job in queue:
                queue.remove(job)
        if self.prefilling is job:
            self.prefilling = None
        if job.running == 0 and job.table is not None:
            self._release(job)
        return dropped

    def cancel(self, job: Job) -> list[Sequence]:
        """Forget the job: its rows and pages are free for the next step. Returns the sequences that were running."""
        running = [sequence for sequence in self.running if sequence.job is job]
        self.drop_waiting(job)
        for sequence in running:
            self.finish(sequence)
        return running

    def _release(self, job: Job) -> None:
        assert job.table is not None
        self.pool.release(job.table)
        job.table = None

    def _jobs(self) -> Iterator[Job]:
        yield from self.waiting
        yield from self.ready
        if self.prefilling is not None:
            yield self.prefilling

    def check_integrity(self) -> None:
        """Rows and pages add up; idle means that all are free."""
        self.pool.check_integrity()
        rows = [sequence.row for sequence in self.running]
        assert len(set(rows)) == len(rows), "two sequences share a row"
        assert not set(rows) & set(self._free_rows), "a row is free and taken"
        held = {
            page for job in {*self._jobs(), *(s.job for s in self.running)} if job.table for page in job.table.pages
        }
        held |= {page for sequence in self.running if sequence.table for page in sequence.table.pages}
        assert len(held) == self.pool.num_pages - self.pool.num_free, "a page is held by nobody known"
