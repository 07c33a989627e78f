"""Scheduler and pages, without torch: nothing is lost, nothing is shared by mistake, nobody waits for ever."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lda_service.engine.pages import PagePool
from lda_service.engine.request import Branch, GenerationRequest, Role, ScoreRequest
from lda_service.engine.scheduler import Job, Scheduler, Sequence

BRANCH = Branch(Role.AMPLIFIED, 1.0)


def generation(name: str, prompt: int, sequences: int, new: int) -> Job:
    """A job of `sequences` rollouts of at most `new` tokens after `prompt` tokens."""
    request = GenerationRequest(name, tuple(range(prompt)), (BRANCH,), sequences)
    job = Job(request, request.prompt_ids)
    job.waiting.extend(Sequence(job, BRANCH, i, new) for i in range(sequences))
    return job


class Steps:
    """Drives a scheduler as the engine does, and notes when sequences start and end."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.finished: list[Sequence] = []
        self.started: list[Sequence] = []

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan.prefill:
            self.scheduler.prefill_done(plan.prefill)
        started = self.scheduler.admit()
        self.started += started
        for sequence in plan.decode + started:
            assert sequence.job.is_prefilled
            sequence.tokens.append(0)
            if len(sequence.tokens) == sequence.max_new_tokens:
                self.scheduler.finish(sequence)
                self.finished.append(sequence)
        self.scheduler.check_integrity()


def test_scheduler_needs_no_torch():
    """Scheduler and requests can be imported on a machine without torch."""
    code = "import sys; sys.modules.update(torch=None, transformers=None); import lda_service.engine.scheduler"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_prompt_is_prefilled_once_for_all_its_sequences():
    """Five rollouts of a 10-token prompt prefill 10 positions, in chunks, and then all start together."""
    scheduler = Scheduler(PagePool(100, 4), 8, prefill_chunk_tokens=4)
    scheduler.add(generation("a", 10, 5, 3))
    chunks = []
    for _ in range(3):
        plan = scheduler.schedule()
        chunks.append((plan.prefill.start, plan.prefill.stop))
        scheduler.prefill_done(plan.prefill)
        started = scheduler.admit()
    assert chunks == [(0, 4), (4, 8), (8, 10)]
    assert len(started) == 5
    assert scheduler.schedule().prefill is None


def test_jobs_take_turns_for_rows():
    """A request for many rollouts does not keep a later one waiting until it is through."""
    scheduler = Scheduler(PagePool(1000, 4), 4, prefill_chunk_tokens=100)
    steps = Steps(scheduler)
    scheduler.add(generation("many", 4, 200, 3))
    steps.step()
    scheduler.add(generation("one", 4, 1, 3))
    for _ in range(12):
        steps.step()
    assert "one" in {sequence.job.request.request_id for sequence in steps.finished}


def test_cancel_frees_rows_and_pages_at_once():
    """After a cancel everything the job held is free for the next step, while neighbours go on."""
    pool = PagePool(100, 4)
    scheduler = Scheduler(pool, 4, 100)
    victim, neighbour = generation("victim", 4, 10, 8), generation("neighbour", 4, 1, 8)
    for job in (neighbour, victim):
        scheduler.add(job)
    steps = Steps(scheduler)
    steps.step()
    steps.step()
    assert len(scheduler.running) == 4
    scheduler.cancel(victim)
    scheduler.check_integrity()
    assert [sequence.job for sequence in scheduler.running] == [neighbour]
    assert pool.num_free == 100 - 1 - 2


def test_a_score_gives_its_pages_back_after_its_last_chunk():
    """A job without sequences ends with its prefill."""
    scheduler = Scheduler(PagePool(10, 4), 1, 4)
    request = ScoreRequest("s", (1, 2, 3), (4, 5, 6))
    scheduler.add(Job(request, (1, 2, 3, 4, 5)))
    for _ in range(2):
        scheduler.prefill_done(scheduler.schedule().prefill)
    assert not scheduler.has_work
    assert scheduler.pool.num_free == 10


@settings(max_examples=100, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 15)), min_size=1, max_size=12),
    pages=st.integers(10, 40),
    rows=st.integers(1, 6),
    chunk=st.integers(1, 30),
)
def test_every_job_that_fits_ends(jobs, pages, rows, chunk):
    """However scarce rows and pages are, every accepted sequence runs to its end, and all is given back."""
    scheduler = Scheduler(PagePool(pages, 4), rows, chunk)
    steps = Steps(scheduler)
    accepted = 0
    for n, (prompt, sequences, new) in enumerate(jobs):
        job = generation(str(n), prompt, sequences, new)
        if scheduler.fits(job):
            scheduler.add(job)
            accepted += sequences
    for _ in range(10_000):
        if not scheduler.has_work:
            break
        steps.step()
    assert not scheduler.has_work
    assert len(steps.finished) == accepted
    assert scheduler.pool.num_free == pages


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, cancels, drops and steps: the books always balance."""

    @initialize(rows=st.integers(1, 5), pages=st.integers(8, 30), chunk=st.integers(1, 9))
    def start(self, rows, pages, chunk):
        self.scheduler = Scheduler(PagePool(pages, 4), rows, chunk)
        self.steps = Steps(self.scheduler)
        self.jobs: list[Job] = []

    @rule(prompt=st.integers(1, 20), sequences=st.integers(1, 6), new=st.integers(1, 10))
    def arrive(self, prompt, sequences, new):
        job = generation(str(len(self.jobs)), prompt, sequences, new)
        if self.scheduler.fits(job):
            self.jobs.append(job)
            self.scheduler.add(job)

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 1000))
    def cancel(self, which):
        self.scheduler.cancel(self.jobs.pop(which % len(self.jobs)))

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 1000))
    def drop_waiting(self, which):
        self.scheduler.drop_waiting(self.jobs[which % len(self.jobs)])

    @rule()
    def step(self):
        self.steps.step()

    @invariant()
    def books_balance(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            if not self.scheduler.has_work:
                assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
