"""Which work the next step does: positions to prefill, sequences to decode. Joining and leaving happen between steps.

A job is one request's prompt with all its sequences. Jobs wait in order of arrival; one prompt is prefilled at a time,
in chunks, while running sequences go on, and only as far as it is not in the caches already. A prefilled job's
sequences take rows as rows and pages become free, and jobs take turns, so that a request for a thousand rollouts does
not keep others out.

Sequences get pages as they grow. When none is free, prompts without a running sequence give theirs back, then the
sequence that started last is preempted: it waits with its tokens, and goes on once these have been prefilled again.
What was preempted goes before what never started, in the order of starting. So the oldest always ends, and then there
is room for the next: prompts are held only by jobs that had all been fitted in side by side. Knows no torch, no text
and no clock.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from itertools import count
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
    compared: bool = True  # whether anybody looks at the two models' logits, not only at their combination
    row: int = -1  # scheduler
    table: PageTable | None = None  # scheduler
    number: int = -1  # scheduler: order of starting; kept when it is preempted
    prefilled: list[int] = field(default_factory=lambda: [0, 0])  # scheduler: up to where, while it is resumed
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

    @property
    def is_prefilled(self) -> bool:
        """Whether all but the last token stand in the caches; that one is the next to be decoded."""
        return min(self.prefilled) >= self.length - 1

    @property
    def tables(self) -> tuple[PageTable, ...]:
        """Where its prompt and its own tokens stand."""
        assert self.job.table is not None
        assert self.table is not None
        return self.job.table, self.table


@dataclass(eq=False, slots=True)
class Job:
    """One request: its prompt, prefilled once for each model, and the sequences that still want a row."""

    request: GenerationRequest | ScoreRequest
    prompt_ids: tuple[int, ...]
    needs: tuple[bool, bool] = (True, True)  # after, before: what its sequences need together
    logits_from: int = 0  # engine: the first position whose logits are wanted
    waiting: deque[Sequence] = field(default_factory=deque)  # preempted ones first
    number: int = -1  # scheduler: order of arrival
    started: bool = False  # scheduler: whether a sequence ever had a row
    running: int = 0  # scheduler: sequences that hold a row
    prefilled: list[int] = field(default_factory=lambda: [0, 0])  # scheduler: positions that after, before need not run
    stored: tuple[int, int] = (0, 0)  # scheduler: positions that stood in both caches when its prefill began
    table: PageTable | None = None  # scheduler
    state: Any = None  # engine: sums, times

    @property
    def is_prefilled(self) -> bool:
        """Whether nothing of the prompt is left to run."""
        return min(self.prefilled) == len(self.prompt_ids)

    @property
    def tables(self) -> tuple[PageTable, ...]:
        """Where its prompt stands."""
        assert self.table is not None
        return (self.table,)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Positions `start` to `stop` - 1 of a job's prompt, or of a preempted sequence's own tokens, to be run.

    Those before `stored` stand in the model's cache already: they are run for their logits, and not written again.
    """

    owner: Job | Sequence
    start: int
    stop: int
    sides: tuple[bool, bool] = (True, True)  # which models run it: after, before
    stored: tuple[int, int] = (0, 0)

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens to run."""
        if isinstance(self.owner, Job):
            return self.owner.prompt_ids[self.start : self.stop]
        first = len(self.owner.job.prompt_ids)
        return tuple(self.owner.tokens[self.start - first : self.stop - first])

    @property
    def prefix(self) -> int:
        """Positions of the prompt behind which a sequence's own tokens stand; 0 for a prompt."""
        return 0 if isinstance(self.owner, Job) else len(self.owner.job.prompt_ids)

    def slots(self) -> list[int]:
        """Slots of all positions before `stop`."""
        tables = self.owner.tables
        return [slot for table in tables for slot in table.slots(table.start, min(self.stop, table.stop))]


@dataclass(slots=True)
class Plan:
    """One step's work, and what was decided for it."""

    prefill: PrefillChunk | None = None
    decode: list[Sequence] = field(default_factory=list)
    admitted: list[Job] = field(default_factory=list)  # left the queue; again, if they had been put back
    evicted: list[Job | Sequence] = field(default_factory=list)  # lost their pages, and wait
    grown: list[tuple[Sequence, tuple[PageTable, ...]]] = field(default_factory=list)  # and the tables new to them


class Scheduler:
    """Waiting and running; admit, finish, cancel. All pages are taken and given back here.

    Args:
        pool: the pages.
        max_running_sequences: rows.
        prefill_chunk_tokens: positions prefilled in a step at most.
        reserve_pages: a sequence takes the pages of its longest course when it starts, and is never preempted.
    """

    def __init__(
        self, pool: PagePool, max_running_sequences: int, prefill_chunk_tokens: int, *, reserve_pages: bool = False
    ) -> None:
        self.pool = pool
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.reserve_pages = reserve_pages
        self.waiting: list[Job] = []  # by number
        self.prefilling: Job | Sequence | None = None
        self.ready: deque[Job] = deque()
        self.running: list[Sequence] = []  # all that hold a row, so the one that is resumed too
        self.preemptions = 0
        self.reused_tokens = 0  # prompt positions that a model did not run again
        self._free_rows = list(range(max_running_sequences - 1, -1, -1))
        self._numbers, self._starts = count(), count()

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
        job.number = next(self._numbers)
        self.waiting.append(job)

    # A step ---------------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """This step's prefill chunk and the sequences that decode, each with the slot of its next position."""
        plan = Plan()
        self._grow(plan)
        while self.prefilling is None and self._choose_prefill(plan):
            pass  # a prompt that is known needs no prefill
        plan.prefill = self._next_chunk()
        plan.decode = [sequence for sequence in self.running if sequence is not self.prefilling]
        return plan

    def prefill_done(self, chunk: PrefillChunk) -> None:
        """The chunk stands in the caches. A job without sequences (a score) is over after its last chunk."""
        owner = chunk.owner
        assert owner is self.prefilling
        for side in (0, 1):
            if chunk.sides[side]:
                assert owner.prefilled[side] == chunk.start, "a position was skipped or run twice"
                owner.prefilled[side] = chunk.stop
                if isinstance(owner, Job):
                    owner.tables[0].note_written(side, chunk.start, chunk.stop)
        if owner.is_prefilled:
            self._prefilled(owner)

    def admit(self) -> list[Sequence]:
        """Give free rows to sequences of prefilled jobs, one each in turn, as far as rows and pages go."""
        started: list[Sequence] = []
        stuck = 0 if self._first_preempted() is None else len(self.ready)
        while self._free_rows and stuck < len(self.ready):
            job = self.ready[0]
            self.ready.rotate(-1)
            if self._needed(job) <= self._spare:
                started.append(self._start(job))
                stuck = 0
            else:
                stuck += 1
        return started

    # Pages for what runs --------------------------------------------------------------------------------------------

    def _grow(self, plan: Plan) -> None:
        """Give each running sequence the slot of its next token, the oldest first; take pages from the youngest."""
        for sequence in sorted(self.running, key=_age):
            while sequence.table is not None and sequence.table.capacity < len(sequence.tokens):
                if self.pool.num_free:
                    plan.grown.append((sequence, (self._extend(sequence),)))
                elif not self._drop_idle_prompt(plan):
                    self._preempt(max(self.running, key=_age), plan)

    def look_ahead(self, sequence: Sequence, wanted: int) -> tuple[int, tuple[PageTable, ...]]:
        """Slots for more than the next token of a running sequence, where each other row keeps a page to grow into.

        Returns:
            how many tokens, at most `wanted`, it may get in this step, and the tables new to it.
        """
        assert sequence.table is not None
        new = []
        wanted = min(wanted, sequence.max_new_tokens - len(sequence.tokens))
        before = len(sequence.tokens) - 1  # the last token's own slot counts: it is run in this step
        while sequence.table.capacity < before + wanted and self.pool.num_free and self._spare >= 0:
            new.append(self._extend(sequence))
        return min(wanted, sequence.table.capacity - before), tuple(new)

    def _extend(self, sequence: Sequence) -> PageTable:
        """Add a page to a running sequence's table; that page alone."""
        assert sequence.table is not None
        part = self._allocate(sequence, sequence.table.stop, 1)
        sequence.table = sequence.table.extended(part)
        return part

    def _allocate(self, sequence: Sequence, start: int, tokens: int) -> PageTable:
        """Fresh pages from `start` for at least `tokens` positions, not beyond the sequence's longest course."""
        room = len(sequence.job.prompt_ids) + sequence.max_new_tokens - start
        whole_pages = self.pool.pages_for(tokens) * self.pool.page_tokens
        return self.pool.allocate(start, min(whole_pages, room))

    def _drop_idle_prompt(self, plan: Plan) -> bool:
        """Take the pages of the youngest prompt that has no running sequence; False if there is none."""
        idle = [job for job in self._jobs() if job.table is not None and job.running == 0]
        if not idle:
            return False
        job = max(idle, key=lambda job: job.number)
        self._leave_queues(job)
        self._release(job)
        insort(self.waiting, job, key=lambda job: job.number)
        plan.evicted.append(job)
        return True

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Take the sequence's row and pages; it waits before its job's others, with its tokens."""
        job = sequence.job
        self._stop(sequence)
        job.waiting.appendleft(sequence)
        if job not in self.ready:
            self.ready.append(job)
        self.preemptions += 1
        plan.evicted.append(sequence)

    # What is prefilled next -----------------------------------------------------------------------------------------

    def _choose_prefill(self, plan: Plan) -> bool:
        """Resume the oldest preempted sequence, or else begin the oldest waiting prompt; False if that must wait."""
        sequence = self._first_preempted()
        job = sequence.job if sequence else next(iter(self.waiting), None)
        if job is None or self._needed(job) > self._spare or (sequence is None and not self._may_begin(job)):
            return False
        if job.table is None:
            self._begin(job, plan)
        elif sequence is not None:
            self._resume(sequence, plan)
        return True

    def _may_begin(self, job: Job) -> bool:
        """Not before there is a row for it, nor while a prefilled job waits for pages: prompts could starve it."""
        spare, newcomers = self._spare, sum(not ready.started for ready in self.ready)
        has_row = newcomers < len(self._free_rows) or not job.waiting
        return has_row and all(self._needed(ready) <= spare for ready in self.ready)

    def _first_preempted(self) -> Sequence | None:
        """Of the sequences that have tokens and no row, the one that started first."""
        preempted = (job.waiting[0] for job in self._jobs() if job.waiting and job.waiting[0].tokens)
        return min(preempted, key=_age, default=None)

    @property
    def _spare(self) -> int:
        """Free pages beside one for each row that may still grow."""
        growing = (sequence.table.capacity < sequence.max_new_tokens for sequence in self.running if sequence.table)
        return self.pool.num_free - sum(growing)

    def _needed(self, job: Job) -> int:
        """Free pages that the job's prompt takes, if it has none yet, and its next sequence."""
        prompt = 0 if job.table is not None else self.pool.pages_to_share(job.prompt_ids)
        return prompt + (self.pool.pages_for(self._first_tokens(job.waiting[0])) if job.waiting else 0)

    def _first_tokens(self, sequence: Sequence) -> int:
        """New positions that a sequence gets with its row."""
        return sequence.max_new_tokens if self.reserve_pages else len(sequence.tokens) + 1

    def _begin(self, job: Job, plan: Plan) -> None:
        """Take the job from the queue: it is prefilled from where the caches end, or wanted logits begin."""
        self.waiting.remove(job)
        job.table = self.pool.share(job.prompt_ids)
        job.stored = (job.table.written(0), job.table.written(1))
        job.prefilled = [self._known(job, side) for side in (0, 1)]
        self.reused_tokens += sum(known for known, needs in zip(job.prefilled, job.needs, strict=True) if needs)
        plan.admitted.append(job)
        if job.is_prefilled:
            self.ready.append(job)
        else:
            self.prefilling = job

    def _known(self, job: Job, side: int) -> int:
        """Positions of the prompt that the model need not run for this job."""
        assert job.table is not None
        total = len(job.prompt_ids)
        has_logits = bool(job.waiting) and job.table.contents[-1].states[side] is not None
        if not job.needs[side] or (job.stored[side] == total and has_logits):
            return total
        return min(job.stored[side], job.logits_from)

    def _resume(self, sequence: Sequence, plan: Plan) -> None:
        """Give a preempted sequence a row again; what it had in the caches is prefilled, if that was anything."""
        job, target = sequence.job, sequence.length - 1
        job.waiting.popleft()
        if not job.waiting:
            self.ready.remove(job)
        self._take_row(sequence)
        sequence.prefilled = [len(job.prompt_ids) if needs else target for needs in sequence.needs]
        plan.grown.append((sequence, sequence.tables))
        if not sequence.is_prefilled:
            self.prefilling = sequence

    def _next_chunk(self) -> PrefillChunk | None:
        """The next positions of what is prefilled, for the models that stand furthest behind."""
        owner = self.prefilling
        if owner is None:
            return None
        start = min(owner.prefilled)
        end = len(owner.prompt_ids) if isinstance(owner, Job) else owner.length - 1
        ahead = [position for position in owner.prefilled if position > start]
        stop = min(start + self.prefill_chunk_tokens, end, *ahead)
        sides = (owner.prefilled[0] == start, owner.prefilled[1] == start)
        return PrefillChunk(owner, start, stop, sides, owner.stored if isinstance(owner, Job) else (0, 0))

    def _prefilled(self, owner: Job | Sequence) -> None:
        self.prefilling = None
        if isinstance(owner, Job):
            if owner.waiting:
                self.ready.append(owner)
            else:
                self._release(owner)

    # Joining and leaving --------------------------------------------------------------------------------------------

    def _start(self, job: Job) -> Sequence:
        sequence = job.waiting.popleft()
        if not job.waiting:
            self.ready.remove(job)
        sequence.number, job.started = next(self._starts), True
        self._take_row(sequence)
        return sequence

    def _take_row(self, sequence: Sequence) -> None:
        start = len(sequence.job.prompt_ids)
        sequence.table = self._allocate(sequence, start, self._first_tokens(sequence))
        sequence.row = self._free_rows.pop()
        sequence.job.running += 1
        self.running.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """The sequence ended: its row and pages are free for the next step; the prompt's too after the last one."""
        self._stop(sequence)
        self._release_if_over(sequence.job)

    def _stop(self, sequence: Sequence) -> None:
        assert sequence.table is not None
        if self.prefilling is sequence:
            self.prefilling = None
        self.running.remove(sequence)
        self._free_rows.append(sequence.row)
        self.pool.release(sequence.table)
        sequence.table, sequence.row = None, -1
        sequence.job.running -= 1

    def drop_waiting(self, job: Job) -> list[Sequence]:
        """Take the job's sequences that have no row out of the queues; returns them, preempted ones first."""
        dropped = list(job.waiting)
        job.waiting.clear()
        self._leave_queues(job)
        self._release_if_over(job)
        return dropped

    def cancel(self, job: Job) -> list[Sequence]:
        """Forget the job: its rows and pages are free for the next step. Returns the sequences that were running."""
        running = [sequence for sequence in self.running if sequence.job is job]
        self.drop_waiting(job)
        for sequence in running:
            self.finish(sequence)
        return running

    def _leave_queues(self, job: Job) -> None:
        for queue in (self.waiting, self.ready):
            if job in queue:
                queue.remove(job)
        if self.prefilling is job:
            self.prefilling = None

    def _release_if_over(self, job: Job) -> None:
        if job.running == 0 and not job.waiting and job.table is not None:
            self._release(job)

    def _release(self, job: Job) -> None:
        assert job.table is not None
        self.pool.release(job.table)
        job.table = None

    # Books ----------------------------------------------------------------------------------------------------------

    def _jobs(self) -> Iterator[Job]:
        """Jobs that want something: a prefill, or rows."""
        yield from self.waiting
        yield from self.ready
        if isinstance(self.prefilling, Job):
            yield self.prefilling

    def check_integrity(self) -> None:
        """Rows, pages and queues add up; idle means that all are free."""
        jobs = {*self._jobs(), *(sequence.job for sequence in self.running)}
        owners: list[Job | Sequence] = [*jobs, *self.running]
        tables = [owner.table for owner in owners if owner.table is not None]
        self.pool.check_integrity(tables)
        rows = [sequence.row for sequence in self.running]
        assert len(set(rows)) == len(rows), "two sequences share a row"
        assert not set(rows) & set(self._free_rows), "a row is free and taken"
        assert all(sequence.table and sequence.job.table for sequence in self.running), "a row without pages"
        assert all(job.table is None for job in self.waiting), "a waiting job holds pages"
        assert all(job.waiting and job.is_prefilled for job in self.ready), "a ready job has nothing to start"
        numbers = [job.number for job in self.waiting]
        assert numbers == sorted(numbers), "the queue is out of order"
        preempted = self._first_preempted()
        assert preempted is None or all(_age(s) < _age(preempted) for s in self.running), "an older one was preempted"


def _age(sequence: Sequence) -> int:
    return sequence.number
