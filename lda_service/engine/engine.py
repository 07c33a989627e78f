"""The decoder: one schedule, two models in lock-step, one draw per row and step.

    step(): schedule, run both, amplify and sample, advance

A step of few rows may run as a block of `speculation` instead, which gives each of them several tokens to advance by.

Knows requests, both runners, the sampler and text streams. Does not know processes, the wire, or wall-clock time: time
comes from the clock it is given. Not thread-safe: whoever owns the engine calls it from one thread.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lda_service.engine import static_decoder
from lda_service.engine.checks import check_queue, check_request, context_metadata, not_finite
from lda_service.engine.lockstep import runner_for
from lda_service.engine.memory import default_cache_tokens, page_tokens
from lda_service.engine.pages import PagePool
from lda_service.engine.request import (
    Admitted,
    Branch,
    Event,
    FinishReason,
    GenerationRequest,
    Load,
    Role,
    ScoreBlock,
    ScoreRequest,
    TokenRecord,
)
from lda_service.engine.rollout import Rollout
from lda_service.engine.rows import (
    RowSpec,
    Scoring,
    columns,
    diagnose_rows,
    rule_out_endings,
    score_rows,
    wants_diagnostics,
)
from lda_service.engine.sampling import Drawn, RowSampling, Sampler
from lda_service.engine.scheduler import Job, Scheduler, Sequence
from lda_service.engine.selfcheck import decodes_alone_as_in_company
from lda_service.engine.speculation import Coupled, Rejection, Speculation
from lda_service.engine.speculation_policy import LENGTHS, Acceptance, Policy
from lda_service.engine.static_decoder import StaticDecoder
from lda_service.engine.warm_up import warm_up
from lda_service.errors import ConfigError, ContextExceeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from lda_service.config import EngineConfig
    from lda_service.engine.pair import Pair
    from lda_service.engine.request import Diagnostics
    from lda_service.engine.scheduler import Plan, PrefillChunk
    from lda_service.engine.static_decoder import Launch

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class JobState:
    """What the engine keeps for a job. The logits after its prompt are states of the prompt's last page."""

    alpha_scores: Tensor  # a score's sums so far, (score alphas,), float64
    admitted_at: float | None = None
    acceptance: Acceptance = field(default_factory=Acceptance)


@dataclass(slots=True)
class Batch:
    """One step's rows and, for each, the next-token logits of both models; they fill up from left to right."""

    sequences: list[Sequence]
    specs: list[RowSpec]
    after: Tensor  # (rows, vocabulary)
    before: Tensor
    settings: RowSampling
    drawable: Tensor = field(init=False)
    drawn: Drawn = field(init=False)


class Engine:
    """Continuous batching over a model pair.

    Args:
        pair: both models; the engine owns them from now on.
        config: limits.
        clock: seconds, monotonic.
    """

    def __init__(self, pair: Pair, config: EngineConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        self.pair = pair
        self.config = config
        self.clock = clock
        self.device = pair.after.device
        self.context_tokens = pair.info.context_tokens
        tokens = config.kv_cache_tokens or default_cache_tokens(pair, config)
        is_static = static_decoder.wanted(config, pair)
        able = pair.has_two_caches and not is_static and not config.deterministic
        self._speculates = config.speculation != "off" and able
        if config.speculation != "off" and not able:
            logger.warning("no speculation: not with an adapter, slow models, static steps or --deterministic")
        is_invariant = pair.backend.invariant and pair.adapted_rows is None
        # Where a row's bits hang on the shape of a step, only steps of the same shapes for the same request will do.
        self._one_by_one = config.deterministic and not is_invariant
        page = page_tokens(config, self.device)
        pool = PagePool(max(1, tokens // page), page, shares_prompts=not self._one_by_one)
        self.scheduler = Scheduler(
            pool,
            config.max_running_sequences,
            config.prefill_chunk_tokens,
            # A static step runs ahead of the host and writes a position that growing pages would not hold yet.
            reserve_pages=config.reserve_pages or config.deterministic or is_static,
        )
        slots = (pool.num_pages + 1) * pool.page_tokens  # with a page that belongs to nobody
        rows = config.max_running_sequences
        self.models = runner_for(pair, slots, rows, self.context_tokens, invariant=config.deterministic)
        self._jobs: dict[str, Job] = {}
        self._events: list[Event] = []
        forbidden = torch.ones(pair.vocabulary_size, dtype=torch.bool, device=self.device)
        forbidden[list(pair.shared_ids)] = False
        self.sampler = Sampler(pair.vocabulary_size, forbidden, pair.backend.kernels)
        rule = Rejection if config.speculation == "auto" else Coupled
        self.speculation = Speculation(self.models, rule(self.sampler))
        self.policy = Policy()
        self._shared = frozenset(pair.shared_ids)
        self._static: StaticDecoder | None = None
        if is_static:
            kernel = static_decoder.kernel_for(pair, page)
            self._static = StaticDecoder(self.models, self.sampler, kernel, one_shape=config.deterministic)
        self._ahead: Launch | None = None
        self._settings_of: list[Sequence] = []
        self._settings: RowSampling

        has_way = is_invariant or is_static
        if config.deterministic and not (has_way and decodes_alone_as_in_company(self)):
            raise ConfigError(
                "These models cannot be decoded deterministically here: on this device, a sequence's logits depend on "
                "its company. Leave out --deterministic; the native kernels on a CPU and static steps on CUDA allow it."
            )

    # What the owner calls -------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def load(self) -> Load:
        """How busy the engine is."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return Load(
            running_sequences=len(scheduler.running),
            waiting_requests=len(scheduler.waiting),
            pages_free=pool.num_free,
            pages_total=pool.num_pages,
            reused_prompt_tokens=scheduler.reused_tokens,
            preemptions=scheduler.preemptions,
        )

    def submit(self, request: GenerationRequest | ScoreRequest) -> None:
        """Put a request in the queue.

        Raises:
            QueueFull: as many requests wait as may wait.
            PromptUnusable: the prompt is empty or holds ids that may not be used.
            ContextExceeded: it cannot fit the context window or the cache.
        """
        check_queue(len(self.scheduler.waiting), self.config.max_queued_requests)
        check_request(request, self._shared, self.context_tokens)
        assert request.request_id not in self._jobs
        job = self._score_job(request) if isinstance(request, ScoreRequest) else self._generation_job(request)
        if not self.scheduler.fits(job):
            slots = self.scheduler.pool.num_pages * self.scheduler.pool.page_tokens
            raise ContextExceeded(
                f"Prompt and output need more than the {slots} cache slots of this server; ask for fewer new tokens.",
                metadata=context_metadata(request, slots),
            )
        self._jobs[request.request_id] = job
        self.scheduler.add(job)

    def cancel(self, request_id: str) -> None:
        """Forget a request: its rows and pages are free for the next step. Unknown ids are ignored."""
        self._events = [event for event in self._events if event.request_id != request_id]
        self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        if job is not None:
            for sequence in self.scheduler.cancel(job):
                self._forget(sequence)
            self._forget(job)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One step: each running sequence gets a token, one prompt a chunk. Returns what happened, in order.

        What a step that raised had to report comes with the next one's events, unless the request is cancelled.
        """
        self._end_expired()
        plan = self._schedule()
        if plan.prefill is not None:
            self._prefill(plan.prefill)
        started = self._admit()
        if self._may_speculate(plan, started):
            self._step_of_few(_by_prompt(plan.decode))
        else:
            decode = plan.decode if self._static is None else self._decode_ahead(self._static, plan.decode)
            self._decode(decode, started)
        events, self._events = self._events, []
        return events

    def warm_up(self) -> None:
        """See `warm_up.warm_up`."""
        warm_up(self, self.pair.shared_ids, self.context_tokens)

    def check_integrity(self) -> None:
        """Pages, rows and caches add up; an idle engine holds nothing."""
        self.scheduler.check_integrity()
        if not self.has_work:
            assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages, "an idle engine holds pages"
            assert not self._jobs, "an idle engine remembers jobs"
            self.models.check_idle()

    # Requests -------------------------------------------------------------------------------------------------------

    def _generation_job(self, request: GenerationRequest) -> Job:
        room = self.context_tokens - len(request.prompt_ids)
        needs = [_needs(request, branch) for branch in request.branches]
        union = (any(after for after, _ in needs), any(before for _, before in needs))
        last = len(request.prompt_ids) - 1
        job = Job(request, request.prompt_ids, union, logits_from=last, state=JobState(_zeros(0)))
        longest = min(request.stopping.max_new_tokens, room)
        for index in range(request.num_sequences):
            for branch, need in zip(request.branches, needs, strict=True):
                job.waiting.append(self._sequence(job, branch, index, longest, need))
        return job

    def _sequence(self, job: Job, branch: Branch, index: int, longest: int, needs: tuple[bool, bool]) -> Sequence:
        request = job.request
        assert isinstance(request, GenerationRequest)
        state = Rollout.begin(request, branch, index, longest, self.pair.pieces, self.pair.stop_ids)
        return Sequence(job, branch, index, longest, needs, _compares(request), state=state)

    def _score_job(self, request: ScoreRequest) -> Job:
        # The last token predicts nothing that is asked for, so it is not run.
        forced = request.prompt_ids + request.continuation_ids[:-1]
        first = len(request.prompt_ids) - 1
        return Job(request, forced, logits_from=first, state=JobState(_zeros(len(request.score_alphas))))

    # Schedule -------------------------------------------------------------------------------------------------------

    def _end_expired(self) -> None:
        """End the sequences of jobs whose time budget is used up."""
        now = self.clock()
        for job in list(self._jobs.values()):
            request = job.request
            budget = request.stopping.time_budget_s if isinstance(request, GenerationRequest) else None
            if budget is None or job.state.admitted_at is None or now < job.state.admitted_at + budget:
                continue
            waiting = self.scheduler.drop_waiting(job)
            for sequence in waiting + [s for s in self.scheduler.running if s.job is job]:
                self._events += sequence.state.end(FinishReason.TIME_BUDGET, now, job.state.admitted_at)
                self._release(sequence)

    def _schedule(self) -> Plan:
        """Plan the step, and carry out what it says about rows and pages."""
        plan = self.scheduler.schedule()
        for owner in plan.evicted:
            self._forget(owner)
        for sequence, tables in plan.grown:
            self.models.assign(sequence, tables)
        for job in plan.admitted:
            if job.state.admitted_at is None:
                job.state.admitted_at = self.clock()
                self._events.append(Admitted(job.request.request_id))
        return plan

    def _admit(self) -> list[Sequence]:
        started = self.scheduler.admit()
        for sequence in started:
            self.models.assign(sequence, sequence.tables)
        return started

    # Speculation ----------------------------------------------------------------------------------------------------

    def _may_speculate(self, plan: Plan, started: list[Sequence]) -> bool:
        """Few rows and nothing beside them, all drawn from both models, nothing reported but tokens."""
        if not self._speculates or plan.prefill is not None or started:
            return False
        few = 0 < len(plan.decode) <= self.config.speculation_max_rows
        return few and all(s.needs == (True, True) and _is_plain(s) for s in plan.decode)

    def _step_of_few(self, sequences: list[Sequence]) -> None:
        """A block, or an ordinary step, whichever pays; its time tells what pays next."""
        began = self.clock()
        room = min(self._room(sequence) for sequence in sequences)
        requests = list({id(s.job): s.job.state.acceptance for s in sequences}.values())
        length = self.policy.choose(requests, len(sequences), room)
        if length:
            self._block(sequences, length)
        else:
            self._decode(sequences, [])
        self.policy.record(len(sequences), length, self.clock() - began)

    def _room(self, sequence: Sequence) -> int:
        """Tokens that a sequence may get in one step."""
        room, tables = self.scheduler.look_ahead(sequence, max(LENGTHS))
        self.models.assign(sequence, tables)
        return room

    def _block(self, sequences: list[Sequence], length: int) -> None:
        """Advance each sequence by what its block gave, up to the token that ends it."""
        yields = self.speculation.run(sequences, length, self._row_sampling(sequences))
        now = self.clock()
        for sequence, given in zip(sequences, yields, strict=True):
            sequence.job.state.acceptance.record(given.accepted, given.tried)
            for drawn in given.tokens:
                if sequence.is_running:
                    self._accept(sequence, *drawn, None, now)

    # One step ahead, in static steps --------------------------------------------------------------------------------

    def _decode_ahead(self, static: StaticDecoder, decode: list[Sequence]) -> list[Sequence]:
        """Launch the next static step, then hand out what the last one drew; returns rows for an ordinary step."""
        last, self._ahead = self._ahead, None
        if last is not None:
            if static.continues(last, [s for s in decode if _is_plain(s)]):
                self._ahead = static.follow(last)
            self._collect(static, last)
        decode = [sequence for sequence in decode if sequence.is_running]
        if self._ahead is None:
            fitting = [sequence for sequence in decode if _is_plain(sequence)]
            self._ahead = static.launch(fitting, self._columns) if fitting else None
        running = set(self._ahead.sequences) if self._ahead else set()
        return [sequence for sequence in decode if sequence not in running]

    def _collect(self, static: StaticDecoder, launch: Launch) -> None:
        """Report what a launch drew."""
        now = self.clock()
        for drawn in static.outcomes(launch):
            if drawn.enough:
                self._accept(drawn.sequence, drawn.token, drawn.logprob, drawn.sound, None, now)
            else:
                static.redraw(drawn.sequence, self._ahead)
                self._decode([drawn.sequence], [])

    # Run both -------------------------------------------------------------------------------------------------------

    def _prefill(self, chunk: PrefillChunk) -> None:
        """Run a chunk; keep the logits that are wanted. A preempted sequence's were used before it was preempted."""
        owner = chunk.owner
        if isinstance(owner, Sequence):
            self.models.prefill(chunk, 1)
            self.scheduler.prefill_done(chunk)
            return
        logits = self.models.prefill(chunk, max(1, chunk.stop - max(chunk.start, owner.logits_from)))
        if isinstance(owner.request, GenerationRequest):
            self._keep_logits(owner, chunk, logits)
        self.scheduler.prefill_done(chunk)
        if isinstance(owner.request, ScoreRequest):
            self._score(owner, owner.request, chunk, logits)

    def _keep_logits(self, job: Job, chunk: PrefillChunk, logits: list[Tensor | None]) -> None:
        """Leave the logits after the prompt with the prompt's last page, for this request and the next like it."""
        assert job.table is not None
        if chunk.stop == len(job.prompt_ids):
            for side, rows in enumerate(logits):
                if rows is not None:
                    job.table.contents[-1].states[side] = rows[-1]

    def _first_logits(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """The logits after the prompts: each of shape (sequences, vocabulary), as `PairRunner.decode` says."""
        after, before = (torch.stack([_prompt_logits(sequence.job, side) for sequence in sequences]) for side in (0, 1))
        return after, before

    def _decode(self, decode: list[Sequence], started: list[Sequence]) -> None:
        """An ordinary step: one token for each sequence."""
        if self._one_by_one and len(decode) + len(started) > 1:
            for sequence in decode + started:
                if sequence.is_running:  # nothing before it ended its request
                    self._decode(*(([sequence], []) if sequence in decode else ([], [sequence])))
        elif decode or started:
            batch = self._run_both(decode, started)
            self._rule_out(batch)
            self._amplify_and_sample(batch)
            self._advance(batch)

    def _run_both(self, decode: list[Sequence], started: list[Sequence]) -> Batch:
        """Both models' next-token logits for every row: decoded ones, then those that start from their prompt's."""
        decode = _by_prompt(decode)
        parts = [self.models.decode(decode)] if decode else []
        if started:
            parts.append(self._first_logits(started))
        after, before = (torch.cat(side) if len(side) > 1 else side[0] for side in zip(*parts, strict=True))
        sequences = decode + started
        return Batch(sequences, [s.state.spec for s in sequences], after, before, self._row_sampling(sequences))

    def _row_sampling(self, sequences: list[Sequence]) -> RowSampling:
        """The rows' settings as columns; only positions change while the same rows go on."""
        if self._settings_of != sequences:
            self._settings_of, self._settings = sequences, self._columns(sequences)
        return self._settings._replace(positions=self._column([s.length for s in sequences], torch.int64))

    def _columns(self, sequences: list[Sequence]) -> RowSampling:
        return columns([sequence.state.spec for sequence in sequences], self.device)

    def _column(self, values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    # Amplify and sample ---------------------------------------------------------------------------------------------

    def _rule_out(self, batch: Batch) -> None:
        """Set `batch.drawable`: the after model's logits of the ids that may be drawn now."""
        batch.drawable = rule_out_endings(batch.after, batch.specs, [len(s.tokens) for s in batch.sequences])

    def _amplify_and_sample(self, batch: Batch) -> None:
        """Draw a token for every row from `after + alpha * (after - before)`."""
        batch.drawn = self.sampler.draw(batch.drawable, batch.before, batch.settings)

    # Advance --------------------------------------------------------------------------------------------------------

    def _advance(self, batch: Batch) -> None:
        """Append the drawn tokens, report them, end what has come to its end."""
        drawn = batch.drawn.tokens
        diagnostics = diagnose_rows(self.sampler, batch.specs, batch.after, batch.before, drawn, self.pair.pieces)
        self._add_scores(batch)
        now = self.clock()
        tokens, logprobs, sound = (column.tolist() for column in batch.drawn)
        for i, (sequence, token) in enumerate(zip(batch.sequences, tokens, strict=True)):
            if sequence.is_running:
                self._accept(sequence, token, logprobs[i], sound[i], diagnostics.get(i), now)

    def _accept(
        self, sequence: Sequence, token: int, logprob: float, sound: bool, diagnostics: Diagnostics | None, now: float
    ) -> None:
        """Append a drawn token and report it; end the request if its logits were not finite. NaN `logprob`: none."""
        if not sound:
            self._fail(sequence)
            return
        sequence.tokens.append(token)
        known = logprob if logprob == logprob else None
        record = TokenRecord(token, self.pair.pieces.piece(token), known, diagnostics)
        self._events += sequence.state.push(record, now, sequence.job.state.admitted_at)
        if sequence.state.has_ended:
            self._release(sequence)

    def _fail(self, sequence: Sequence) -> None:
        """The models gave NaN or infinity (a float16 overflow, broken weights): end the request, invent nothing."""
        request_id = sequence.job.request.request_id
        assert sequence.job.table is not None
        self.scheduler.pool.discard(sequence.job.table)
        self._drop(request_id)
        self._events.append(not_finite(request_id))

    def _release(self, sequence: Sequence) -> None:
        """Free what an ended sequence holds, if it has a row."""
        if sequence.is_running:
            self._forget(sequence)
            self.scheduler.finish(sequence)
        self._retire(sequence.job)

    def _retire(self, job: Job) -> None:
        """Forget the job if nothing of it is left."""
        if job.running == 0 and not job.waiting:
            self._jobs.pop(job.request.request_id, None)
            self._forget(job)

    def _forget(self, owner: Sequence | Job) -> None:
        self.models.forget(owner)
        if self._static is not None:
            self._static.forget(owner)

    # Evidence -------------------------------------------------------------------------------------------------------

    def _add_scores(self, batch: Batch) -> None:
        """Add log q_alpha of the drawn tokens to the sequences that asked for it."""
        alone = self.config.deterministic
        found = score_rows(self.sampler, batch.specs, batch.drawable, batch.before, batch.drawn.tokens, alone=alone)
        for i, scores in found.items():
            batch.sequences[i].state.alpha_scores += scores

    def _score(self, job: Job, request: ScoreRequest, chunk: PrefillChunk, logits: list[Tensor | None]) -> None:
        """Report the continuation's tokens that this chunk predicts."""
        after, before = logits
        first = max(chunk.start, job.logits_from)
        if chunk.stop > first:
            assert after is not None
            assert before is not None
            offset = first + 1 - len(request.prompt_ids)
            ids = request.continuation_ids[offset : offset + chunk.stop - first]
            self._score_block(request, job.state, offset, ids, after, before)
            job.logits_from = chunk.stop
        if job.is_prefilled:
            self._retire(job)

    def _score_block(
        self,
        request: ScoreRequest,
        state: JobState,
        offset: int,
        ids: tuple[int, ...],
        after: Tensor,
        before: Tensor,
    ) -> None:
        scoring = Scoring(request.alpha, request.top_candidates, request.score_alphas)
        records, sums = scoring.apply(self.sampler, after, before, ids, self.pair.pieces)
        state.alpha_scores += sums
        total = len(request.continuation_ids)
        is_last = offset + len(ids) == total
        scores = tuple(state.alpha_scores.tolist()) if is_last else ()
        self._events.append(ScoreBlock(request.request_id, offset, tuple(records), total, is_last, scores))


def _prompt_logits(job: Job, side: int) -> Tensor:
    """One model's logits after a prompt; the other's where the job does not need that model."""
    assert job.table is not None
    logits: Tensor = job.table.contents[-1].states[side if job.needs[side] else 1 - side]
    return logits


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def _by_prompt(sequences: list[Sequence]) -> list[Sequence]:
    """Rows of one prompt stand together, so that its keys and values are read once."""
    return sorted(sequences, key=lambda sequence: sequence.job.table.pages)  # type: ignore[union-attr]


def _compares(request: GenerationRequest) -> bool:
    """Whether anything but the combination of the two models' logits is looked at."""
    evidence = wants_diagnostics(request) or bool(request.output.score_alphas)
    return evidence or request.sampling.plausibility > 0


def _is_plain(sequence: Sequence) -> bool:
    """Whether static steps and blocks can draw its next token: nothing but the token is asked for, and it may end."""
    spec: RowSpec = sequence.state.spec
    return spec.is_bare and len(sequence.tokens) >= spec.min_new_tokens


def _needs(request: GenerationRequest, branch: Branch) -> tuple[bool, bool]:
    """Which models a branch needs: (after, before)."""
    if wants_diagnostics(request) or request.output.score_alphas:
        return True, True
    plausible = request.sampling.plausibility > 0 and branch.role is not Role.BEFORE
    return branch.alpha != -1 or plausible, branch.alpha != 0
