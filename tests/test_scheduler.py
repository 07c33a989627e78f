"""Scheduler and pages, without torch: nothing is lost, nothing is shared by mistake, nobody waits for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lda_service.engine.pages import IDLE_STATES, PagePool
from lda_service.engine.request import Branch, GenerationRequest, Role, ScoreRequest
from lda_service.engine.scheduler import Job, Scheduler, Sequence

BRANCH = Branch(Role.AMPLIFIED, 1.0)
BOTH, AFTER, BEFORE = (True, True), (True, False), (False, True)


def generation(name: str, prompt: int | tuple[int, ...], sequences: int, new: int, needs=BOTH) -> Job:
    """A job of `sequences` rollouts of at most `new` tokens after a prompt, or after `prompt` tokens of its own."""
    ids = tuple(hash((name, i)) for i in range(prompt)) if isinstance(prompt, int) else prompt
    request = GenerationRequest(name, ids, (BRANCH,), sequences)
    job = Job(request, ids, needs, logits_from=len(ids) - 1)
    job.waiting.extend(Sequence(job, BRANCH, i, new, needs) for i in range(sequences))
    return job


def scoring(name: str, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> Job:
    """A score job: a prompt without sequences whose last positions' logits are wanted."""
    return Job(ScoreRequest(name, prompt, continuation), prompt + continuation[:-1], logits_from=len(prompt) - 1)


class Steps:
    """Drives a scheduler as the engine does, on a cache that stores, for each slot, the text it was computed from.

    Whatever is read is compared with the text of who reads it: so a page that is shared by mistake, overwritten while
    somebody reads it, or handed out again too early is noticed at the next read.
    """

    def __init__(self, scheduler: Scheduler, block: int = 1):
        self.scheduler = scheduler
        self.block = block  # tokens that a step without newcomers draws at most for each sequence
        self.memory: tuple[dict, dict] = ({}, {})
        self.slots: dict[int, dict[int, int]] = {}  # by row, by position
        self.finished: list[Sequence] = []
        self.started: list[Sequence] = []
        self.evicted: list[Job | Sequence] = []
        self.scored: dict[Job, list[int]] = {}
        self.ran = [0, 0]  # positions run: after, before

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.evicted += plan.evicted
        for owner in plan.evicted:
            if isinstance(owner, Sequence):
                assert any(s.number < owner.number for s in self.scheduler.running), "the oldest was preempted"
        for sequence, tables in plan.grown:
            self.assign(sequence, tables)
        if plan.prefill:
            self.prefill(plan.prefill)
        started = self.scheduler.admit()
        self.started += started
        rooms = self.look_ahead(plan.decode) if plan.prefill is None and not started else [1] * len(plan.decode)
        for sequence, room in zip(plan.decode, rooms, strict=True):
            for _ in range(room - 1):
                self.decode(sequence)
                self.draw(sequence)
            self.decode(sequence)
        for sequence in started:
            self.assign(sequence, sequence.tables)
            states = sequence.job.table.contents[-1].states
            assert all(
                state == sequence.job.prompt_ids for state, needs in zip(states, sequence.needs, strict=True) if needs
            )
        for sequence in plan.decode + started:
            self.draw(sequence)
        self.scheduler.check_integrity()

    def look_ahead(self, sequences):
        """How many tokens each sequence gets; a block ends anywhere."""
        rooms = []
        for sequence in sequences:
            room, tables = self.scheduler.look_ahead(sequence, self.block)
            assert 1 <= room <= self.block
            self.assign(sequence, tables)
            rooms.append(1 + sequence.length % room)
        return rooms

    def assign(self, sequence, tables):
        row = self.slots.setdefault(sequence.row, {})
        for table in tables:
            row.update(enumerate(table.slots(table.start, table.stop), table.start))

    def prefill(self, chunk):
        owner = chunk.owner
        text = owner.prompt_ids if isinstance(owner, Job) else owner.job.prompt_ids + tuple(owner.tokens)
        slots = dict(enumerate(chunk.slots()))
        assert chunk.ids == text[chunk.start : chunk.stop]
        assert 0 < len(chunk.ids) <= self.scheduler.prefill_chunk_tokens
        assert any(chunk.sides)
        for side in (0, 1):
            if chunk.sides[side]:
                self.ran[side] += len(chunk.ids)
                written = {slots[position] for position in range(max(chunk.start, chunk.stored[side]), chunk.stop)}
                assert written.isdisjoint(self.read_by_others(owner, side)), "written while another reads it"
                self.run(side, text, slots, range(chunk.start, chunk.stop), chunk.stored[side])
                if isinstance(owner, Job) and chunk.stop == len(text):
                    owner.table.contents[-1].states[side] = text
        self.scheduler.prefill_done(chunk)
        if isinstance(owner, Job) and isinstance(owner.request, ScoreRequest) and chunk.stop > owner.logits_from:
            assert chunk.sides == (True, True)
            self.scored.setdefault(owner, []).extend(range(max(chunk.start, owner.logits_from), chunk.stop))
            owner.logits_from = chunk.stop

    def read_by_others(self, owner, side):
        """Slots that running sequences read in this model's cache."""
        readers = [s for s in self.scheduler.running if s is not owner and s.needs[side]]
        return {slot for s in readers for position, slot in self.slots[s.row].items() if position < s.length - 1}

    def decode(self, sequence):
        text = sequence.job.prompt_ids + tuple(sequence.tokens)
        for side in (0, 1):
            if sequence.needs[side]:
                self.run(side, text, self.slots[sequence.row], [len(text) - 1])

    def run(self, side, text, slots, positions, stored=0):
        """Write what is new, then read everything up to the last position."""
        for position in positions:
            if position >= stored:
                self.memory[side][slots[position]] = text[: position + 1]
        for position in range(positions[-1] + 1):
            assert self.memory[side][slots[position]] == text[: position + 1]

    def draw(self, sequence):
        sequence.tokens.append(hash((sequence.job.request.request_id, sequence.index, len(sequence.tokens))))
        if len(sequence.tokens) == sequence.max_new_tokens:
            self.scheduler.finish(sequence)
            self.finished.append(sequence)

    def until_idle(self, limit=10_000) -> int:
        """Steps to the end."""
        for step in range(limit):
            if not self.scheduler.has_work:
                return step
            self.step()
        raise AssertionError("never idle")


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


def test_a_prompt_waits_for_a_row():
    """Without one it takes no pages: they would only be missing elsewhere."""
    steps = Steps(Scheduler(PagePool(100, 4), 1, 100))
    steps.scheduler.add(generation("first", 4, 1, 30))
    waiting = [generation(name, 8, 1, 2) for name in ("second", "third")]
    for job in waiting:
        steps.scheduler.add(job)
    for _ in range(20):
        steps.step()
    assert all(job.table is None for job in waiting)
    steps.until_idle()
    assert [sequence.job.request.request_id for sequence in steps.finished] == ["first", "second", "third"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_that_becomes_free_goes_to_a_newcomer(rows):
    """Also where rows become free one by one, and each time other jobs want them."""
    scheduler = Scheduler(PagePool(1000, 4), rows, prefill_chunk_tokens=100)
    steps = Steps(scheduler)
    for name, new in (("many", 5), ("more", 7)):
        scheduler.add(generation(name, 4, 200, new))
        steps.step()
    scheduler.add(generation("one", 4, 1, 3))
    for _ in range(40):
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
    assert pool.num_free == 100 - 1 - 1


def test_a_score_gives_its_pages_back_after_its_last_chunk():
    """A job without sequences ends with its prefill."""
    scheduler = Scheduler(PagePool(10, 4), 1, 4)
    scheduler.add(scoring("s", (1, 2, 3), (4, 5, 6)))
    for _ in range(2):
        scheduler.prefill_done(scheduler.schedule().prefill)
    assert not scheduler.has_work
    assert scheduler.pool.num_free == 10


class TestKnownPrompts:
    """What stands in the caches is not run again, by either model."""

    def ran(self, *jobs, pages=100, chunk=100):
        """Positions that each model runs over the prompts of jobs that come one after the other."""
        steps, ran = Steps(Scheduler(PagePool(pages, 4), 8, chunk)), []
        for job in jobs:
            before = list(steps.ran)
            steps.scheduler.add(job)
            steps.until_idle()
            ran.append(tuple(now - then for now, then in zip(steps.ran, before, strict=True)))
        return ran

    @pytest.mark.parametrize("length", [3, 8, 10])
    def test_the_same_prompt_again_runs_nothing(self, length):
        """Whether or not the prompt ends with a page."""
        prompt = tuple(range(length))
        assert self.ran(*(generation(str(i), prompt, 2, 5) for i in range(3))) == [(length, length), (0, 0), (0, 0)]

    def test_each_model_runs_a_prompt_once(self):
        """First one model, then both: the second request runs the model that is missing, and the third nothing."""
        needs = [AFTER, AFTER, BOTH, BEFORE, BOTH]
        ran = self.ran(*(generation(str(i), tuple(range(10)), 1, 3, need) for i, need in enumerate(needs)), chunk=4)
        assert ran == [(10, 0), (0, 0), (0, 10), (0, 0), (0, 0)]

    def test_a_common_beginning_is_run_once(self):
        """Whole pages that two prompts share; what follows the first difference is each prompt's own."""
        first, second = (*range(10), 20, 21), (*range(9), 30, 31)
        assert self.ran(generation("a", first, 1, 3), generation("b", second, 1, 3)) == [(12, 12), (3, 3)]

    def test_the_beginning_of_a_known_prompt_runs_its_last_token_only(self):
        """Its keys and values are there; the logits after it were never kept. The second time they are."""
        long, short = tuple(range(12)), tuple(range(8))
        jobs = [generation(str(i), ids, 1, 3) for i, ids in enumerate([long, short, short])]
        assert self.ran(*jobs) == [(12, 12), (1, 1), (0, 0)]

    def test_a_score_reuses_what_comes_before_its_logits(self):
        """Positions whose logits are wanted are run again, without touching what others read."""
        prompt, continuation = tuple(range(9)), tuple(range(20, 26))
        score = lambda name: scoring(name, prompt, continuation)
        assert self.ran(score("a"), score("b"), generation("c", prompt, 1, 3)) == [(14, 14), (6, 6), (1, 1)]

    def test_a_row_that_reads_is_not_disturbed(self):
        """While a rollout decodes, its prompt is scored, extended and run by the other model; each read is checked."""
        steps = Steps(Scheduler(PagePool(100, 4), 8, 3))
        prompt = tuple(range(8))
        steps.scheduler.add(generation("long", prompt, 2, 60, AFTER))
        for _ in range(6):
            steps.step()
        others = [
            generation("both", prompt, 1, 5),
            scoring("score", prompt[:4], (*prompt[4:], 99)),
            generation("more", (*prompt, 7, 7, 7), 1, 5),
            generation("less", prompt[:4], 1, 5),
        ]
        for job in others:
            steps.scheduler.add(job)
        steps.until_idle()
        assert len(steps.finished) == 5

    def test_the_least_recently_used_prompt_makes_room(self):
        """When pages run out, the prompt that nobody asked for the longest goes, its end first."""
        prompts = [tuple(range(100 * i, 100 * i + 16)) for i in range(3)]
        order = [0, 1, 0, 2, 0, 1]
        jobs = [generation(str(n), prompts[i], 1, 4) for n, i in enumerate(order)]
        ran = [after for after, _ in self.ran(*jobs, pages=10)]
        assert ran[:5] == [16, 16, 0, 16, 0]
        assert 0 < ran[5] <= 16

    def test_few_states_are_kept_for_nobody(self):
        """Of many known prompts only the latest keep their logits; the others run their last token again."""
        count = IDLE_STATES + 2
        jobs = [generation(str(i), (i,), 1, 1) for i in range(count)]
        again = [generation(f"again {i}", (i,), 1, 1) for i in (count - 1, 0)]
        assert self.ran(*jobs, *again)[-2:] == [(0, 0), (1, 1)]


class TestPreemption:
    """Pages run out: the youngest waits, and goes on where it was."""

    def test_the_youngest_gives_way_and_ends_too(self):
        """Four rollouts that fit only two at a time: the oldest is never preempted, all draw what they would alone."""
        steps = Steps(Scheduler(PagePool(10, 4), 4, 6))
        steps.scheduler.add(generation("a", 8, 4, 16))
        steps.until_idle()
        assert steps.scheduler.preemptions > 0
        assert [sequence.index for sequence in steps.finished] == sorted(s.index for s in steps.finished)
        for sequence in steps.finished:
            assert sequence.tokens == [hash(("a", sequence.index, i)) for i in range(16)]

    def test_reserved_pages_mean_no_preemption(self):
        """With `reserve_pages` the same work waits instead."""
        steps = Steps(Scheduler(PagePool(10, 4), 4, 6, reserve_pages=True))
        steps.scheduler.add(generation("a", 8, 4, 16))
        steps.until_idle()
        assert steps.scheduler.preemptions == 0
        assert len(steps.finished) == 4

    def test_a_start_leaves_a_page_for_each_row_that_grows(self):
        """Ten pages, one for the prompt: eight rollouts could have one page each, but then none a second one."""
        scheduler = Scheduler(PagePool(10, 4), 8, 4)
        scheduler.add(generation("a", 4, 8, 8))
        steps = Steps(scheduler)
        steps.step()
        assert len(steps.started) == 5

    def test_a_prompt_without_rows_gives_way_first(self):
        """A waiting prompt's pages go to a running sequence, and come back when it is prefilled again."""
        scheduler = Scheduler(PagePool(13, 4), 4, 1)
        steps = Steps(scheduler)
        scheduler.add(generation("old", 4, 1, 28))
        for _ in range(10):
            steps.step()
        scheduler.add(generation("new", 26, 1, 2))
        steps.until_idle()
        assert [owner.request.request_id for owner in steps.evicted] == ["new"]
        assert [sequence.job.request.request_id for sequence in steps.finished] == ["old", "new"]

    def test_blocks_take_pages_ahead_but_not_those_that_others_grow_into(self):
        """A row looks ahead into its own next page while each other row that may grow has one left beside it."""
        for pages, rooms in ((4, [4, 4]), (5, [8, 4]), (6, [8, 8])):
            scheduler = Scheduler(PagePool(pages, 4), 2, 4)
            scheduler.add(generation("a", 4, 2, 12))
            steps = Steps(scheduler)
            steps.step()
            assert scheduler.pool.num_free == pages - 3
            assert [scheduler.look_ahead(sequence, 8)[0] for sequence in scheduler.running] == rooms
            scheduler.check_integrity()

    @pytest.mark.parametrize("leave", ["cancel", "drop_waiting"])
    @pytest.mark.parametrize("when", ["preempted", "resumed"])
    def test_leaving_at_any_moment_gives_all_back(self, leave, when):
        """A job with a sequence that is preempted, or being recomputed, holds nothing after it left."""
        scheduler = Scheduler(PagePool(10, 4), 4, 2)
        steps = Steps(scheduler)
        job = generation("a", 8, 4, 16)
        scheduler.add(job)
        there = lambda: any(s.tokens for s in job.waiting) if when == "preempted" else scheduler.prefilling in running()
        running = lambda: list(scheduler.running)
        while not there():
            steps.step()
        resumed = scheduler.prefilling
        getattr(scheduler, leave)(job)
        scheduler.check_integrity()
        if leave == "cancel":
            assert not scheduler.has_work
            assert scheduler.pool.num_free == 10
        else:
            steps.until_idle()
            assert when == "preempted" or resumed in steps.finished


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20).map(tuple)
needs = st.sampled_from([BOTH, AFTER, BEFORE])


@settings(max_examples=150, deadline=None)
@given(
    jobs=st.lists(st.tuples(prompts, st.integers(0, 8), st.integers(1, 15), needs), min_size=1, max_size=12),
    pages=st.integers(8, 30),
    rows=st.integers(1, 6),
    chunk=st.integers(1, 30),
    reserve=st.booleans(),
    block=st.sampled_from([1, 6]),
)
def test_every_job_that_fits_ends(jobs, pages, rows, chunk, reserve, block):
    """However scarce rows and pages are, every accepted sequence runs to its end, and all is given back."""
    scheduler = Scheduler(PagePool(pages, 4), rows, chunk, reserve_pages=reserve)
    steps = Steps(scheduler, block)
    accepted = []
    for n, (prompt, sequences, new, need) in enumerate(jobs):
        job = generation(str(n), prompt, sequences, new, need) if sequences else scoring(str(n), prompt, (5,) * new)
        if scheduler.fits(job):
            scheduler.add(job)
            accepted.append((job, sequences))
    steps.until_idle()
    assert len(steps.finished) == sum(sequences for _, sequences in accepted)
    for job, sequences in accepted:
        if not sequences:
            assert steps.scored[job] == list(range(len(job.request.prompt_ids) - 1, len(job.prompt_ids)))
    assert scheduler.pool.num_free == pages
    assert not (reserve and scheduler.preemptions)


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, cancels, drops and steps in a small cache: the books always balance, every read is right."""

    @initialize(
        rows=st.integers(1, 5),
        pages=st.integers(6, 20),
        chunk=st.integers(1, 9),
        reserve=st.booleans(),
        block=st.sampled_from([1, 6]),
    )
    def start(self, rows, pages, chunk, reserve, block):
        self.scheduler = Scheduler(PagePool(pages, 4), rows, chunk, reserve_pages=reserve)
        self.steps = Steps(self.scheduler, block)
        self.jobs: list[Job] = []

    @rule(prompt=prompts, sequences=st.integers(1, 6), new=st.integers(1, 20), needs=needs)
    def arrive(self, prompt, sequences, new, needs):
        self.add(generation(str(len(self.jobs)), prompt, sequences, new, needs))

    @rule(prompt=prompts, continuation=prompts)
    def score(self, prompt, continuation):
        self.add(scoring(str(len(self.jobs)), prompt, continuation))

    def add(self, job):
        if self.scheduler.fits(job):
            self.jobs.append(job)
            self.scheduler.add(job)

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 1000))
    def cancel(self, which):
        self.scheduler.cancel(self.jobs.pop(which % len(self.jobs)))

    @precondition(lambda self: self.scheduler.running)
    @rule(which=st.integers(0, 1000))
    def fail(self, which):
        """The logits of a row were broken: what stands in its prompt's pages may be too."""
        job = self.scheduler.running[which % len(self.scheduler.running)].job
        self.scheduler.pool.discard(job.table)
        self.scheduler.check_integrity()
        self.scheduler.cancel(job)
        self.jobs.remove(job)

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 1000))
    def drop_waiting(self, which):
        self.scheduler.drop_waiting(self.jobs[which % len(self.jobs)])

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.steps.step()

    @invariant()
    def books_balance(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            if not self.scheduler.has_work:
                assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages

    def teardown(self):
        if hasattr(self, "steps"):
            self.steps.until_idle()


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
