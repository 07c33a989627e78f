"""Surveys: prompts x alphas x rollouts, drawn from any number of servers into a run folder.

    settings = SurveySettings(alphas=(0, 0.5, 1), rollouts=1000)
    outcome = run_survey("runs/first", read_prompts(["prompts.txt"]), settings, ["gpu-1:50051", "gpu-2:50051"])
    outcome = run_survey("runs/first", read_prompts(["prompts.txt"]), settings, ["3@envoy:8000"])
    outcome = resume_survey("runs/first", ["gpu-1:50051"])

A survey may be killed at any moment: finished chunks are in the folder's journal and are never drawn twice. What a
budget or an interruption leaves out is what comes last in a fixed order, never what happened to take long: chunks that
have begun are let to their end, or drawn again with the same seed.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lda_client import DEFAULT_TARGET, __version__, pb
from lda_client._requests import generate_request
from lda_client.lab._errors import PairsDiffer, RunError, SettingsDiffer, SettingsError
from lda_client.lab._files import write_text
from lda_client.lab._fleet import Fleet, Work, connected
from lda_client.lab._journal import Journal
from lda_client.lab._progress import Quiet, Reporter
from lda_client.lab._settings import Chunk, SurveySettings, breadth_first
from lda_client.lab.prompts import Prompt, to_jsonl
from lda_client.lab.runs import (
    Manifest,
    Run,
    chunk_rows,
    compact,
    locked,
    manifest_path,
    pack,
    pair_facts,
    prompts_path,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from lda_client import Completions, Tls
    from lda_client.lab._fleet import Endpoint

TOKENS_PER_EVENT = 256
FLUSH_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Pace:
    """How fast a survey goes, and how far; nothing here changes what is drawn.

    Attributes:
        at_once: calls under way at the same time; None keeps every row of every server busy.
        budget_tokens: new tokens that this sitting may draw, about; None sets no bound.
        budget_minutes: minutes after which it begins no more chunks; None sets no bound.
        patience_s: how long to wait while no server does anything.
        call_timeout_s: deadline of one call, after which its chunk is drawn again; None waits as long as it takes.
    """

    at_once: int | None = None
    budget_tokens: int | None = None
    budget_minutes: float | None = None
    patience_s: float = 300.0
    call_timeout_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a sitting ended.

    Attributes:
        run: the run folder.
        drawn: rollouts drawn in this sitting.
        tokens: new tokens drawn in this sitting.
        missing: rollouts that the survey still lacks; 0 when it is complete.
        seconds: how long it took.
    """

    run: Run
    drawn: int
    tokens: int
    missing: int
    seconds: float


def run_survey(
    folder: str | Path,
    prompts: Sequence[Prompt],
    settings: SurveySettings,
    targets: Sequence[str] = (DEFAULT_TARGET,),
    *,
    credentials: Tls | grpc.ChannelCredentials | None = None,
    token: str | None = None,
    pace: Pace | None = None,
    reporter: Reporter | None = None,
) -> Outcome:
    """Draw a survey into a folder; go on with it if the folder holds one that was begun with the same settings.

    Args:
        folder: of the run.
        prompts: their ids are unique.
        settings: what to draw.
        targets: addresses of servers, all of which must hold the same pair; `3@envoy:8000` is one address before three.
        credentials: as for `LdaClient`; for every server.
        token: likewise.
        pace: how fast, and how far.
        reporter: is told how it goes.

    Raises:
        SettingsError: these settings cannot be used; `SettingsDiffer` if the folder was begun with others.
        PairsDiffer: the servers do not hold one pair, or not that of the folder.
        RunError: the folder cannot be used.
        SurveyFailed: the servers did not come back. What is finished is kept.
        LdaClientError: a server rejected what was asked, or none answered at the start.
    """
    return asyncio.run(
        run_survey_async(
            folder, prompts, settings, targets, credentials=credentials, token=token, pace=pace, reporter=reporter
        )
    )


async def run_survey_async(
    folder: str | Path,
    prompts: Sequence[Prompt],
    settings: SurveySettings,
    targets: Sequence[str] = (DEFAULT_TARGET,),
    *,
    credentials: Tls | grpc.ChannelCredentials | None = None,
    token: str | None = None,
    pace: Pace | None = None,
    reporter: Reporter | None = None,
) -> Outcome:
    """`run_survey` for asyncio, and for notebooks."""
    settings.require_estimable()
    sitting = _Sitting(Path(folder), list(prompts), settings, pace or Pace(), Quiet() if reporter is None else reporter)
    return await sitting.run(targets, credentials, token)


def resume_survey(folder: str | Path, targets: Sequence[str] = (), **options: Any) -> Outcome:
    """Go on with a survey, by default at the servers it was last drawn from. Options and errors as `run_survey`."""
    run = Run.open(folder)
    sessions = run.manifest.sessions
    known = [str(endpoint["target"]) for endpoint in sessions[-1]["endpoints"]] if sessions else [DEFAULT_TARGET]
    return run_survey(folder, run.prompts(), run.settings, list(targets) or known, **options)


class _Sitting:
    """One start of a survey, up to its end, its budget, or a failure."""

    def __init__(
        self, folder: Path, prompts: list[Prompt], settings: SurveySettings, pace: Pace, reporter: Reporter
    ) -> None:
        self._folder = folder
        self._prompts = prompts
        self._settings = settings
        self._pace = pace
        self._reporter = reporter
        self._begun_at = time.monotonic()
        self._drawn = self._tokens = self._chunks_done = 0

    async def run(
        self, targets: Sequence[str], credentials: Tls | grpc.ChannelCredentials | None, token: str | None
    ) -> Outcome:
        if not targets or len(set(targets)) < len(targets):
            raise SettingsError("targets: give at least one server, and none twice.")
        async with AsyncExitStack() as stack:
            self._fleet = Fleet(
                [await stack.enter_async_context(connected(target, credentials, token)) for target in targets],
                self._pace.patience_s,
                lambda event, target, why: self._reporter.note(event, target=target, why=why),
            )
            pair = await self._fleet.connect()
            self._check_limits(pair)
            stack.enter_context(locked(self._folder))
            self._run = self._open_run(pair)
            if self._run.is_complete:
                return self._outcome(missing=0)
            self._run.save()
            self._journal = stack.enter_context(Journal(self._run.journal_path))
            return await self._draw_missing()

    # The folder -----------------------------------------------------------------------------------------------------

    def _open_run(self, pair: pb.GetModelPairResponse) -> Run:
        """The run of the folder, which is made if there is none, with this sitting in its manifest."""
        begun = self._new_manifest(pair)
        run = self._begun_run()
        if run is None:
            write_text(prompts_path(self._folder), to_jsonl(self._prompts))
            run = Run(self._folder, begun)
        else:
            _require_same(run, begun, self._prompts)
        return replace(run, manifest=run.manifest.with_session(self._session()))

    def _begun_run(self) -> Run | None:
        """The run of the folder; None if nothing was drawn into it, so that it may begin with any settings."""
        if manifest_path(self._folder).exists():
            run = Run.open(self._folder)
            return run if run.has_begun else None
        others = sorted(
            path.name for path in self._folder.iterdir() if path.name[0] != "." and path.name != "prompts.jsonl"
        )
        if others:
            raise RunError(f"{self._folder}: holds other files, such as {others[0]}; give a new folder.")
        return None

    def _new_manifest(self, pair: pb.GetModelPairResponse) -> Manifest:
        return Manifest(
            settings=self._settings,
            prompts_sha256=sha256(to_jsonl(self._prompts).encode()).hexdigest(),
            chat_template=pair.has_chat_template and not self._settings.raw,
            pair=pair_facts(pair),
            created=_now(),
        )

    def _session(self) -> dict[str, Any]:
        endpoints = [
            {
                "target": endpoint.target,
                "server_version": endpoint.pair.server_version if endpoint.pair else None,
                "device": endpoint.pair.device if endpoint.pair else None,
            }
            for endpoint in self._fleet.endpoints
        ]
        return {"started": _now(), "client_version": __version__, "endpoints": endpoints}

    # Before anything is drawn ---------------------------------------------------------------------------------------

    def _check_limits(self, pair: pb.GetModelPairResponse) -> None:
        """Raise SettingsError for what every call would be rejected for. A limit of 0 is one that is not told."""
        limits, settings = pair.limits, self._settings
        if 0 < limits.max_new_tokens < settings.max_new_tokens:
            raise SettingsError(f"max_new_tokens: the server allows {limits.max_new_tokens}.")
        if 0 < limits.max_sequences_per_request < settings.chunk_size:
            raise SettingsError(f"chunk_size: the server draws {limits.max_sequences_per_request} sequences a call.")
        for alpha in (*settings.alphas, *settings.score_alphas):
            if limits.min_alpha < limits.max_alpha and not limits.min_alpha <= alpha <= limits.max_alpha:
                raise SettingsError(
                    f"alphas: the server allows {limits.min_alpha:g} to {limits.max_alpha:g}, and not {alpha:g}."
                )

    async def _admit(self, endpoint: Endpoint, prompt: int) -> None:
        """Have a server look at a prompt as it will be asked; leave before it draws more than a token or so."""
        request = self._request(Chunk(0, prompt, self._settings.alphas[0], 0, 1, 0))
        async with endpoint.client.generate(request, timeout_s=self._pace.call_timeout_s) as stream:
            await anext(stream)

    # Drawing --------------------------------------------------------------------------------------------------------

    async def _draw_missing(self) -> Outcome:
        chunks = list(self._settings.chunks([prompt.id for prompt in self._prompts]))
        finished = self._journal.numbers()
        todo = breadth_first(chunk for chunk in chunks if chunk.number not in finished)
        admitted = {chunk.prompt for chunk in chunks if chunk.number in finished}
        await self._have_admitted(sorted({chunk.prompt for chunk in todo} - admitted))
        left = sum(chunk.sequences for chunk in todo)
        self._reporter.begin(sum(chunk.sequences for chunk in chunks), sum(chunk.sequences for chunk in chunks) - left)
        await self._draw_all(todo)
        compact(self._run, self._journal)
        if self._drawn == left:
            self._run.journal_path.unlink()
        return self._outcome(missing=left - self._drawn)

    async def _have_admitted(self, prompts: list[int]) -> None:
        """Find out what would be rejected before anything is paid for."""
        await Work(self._fleet, prompts, self._admit, _ignore, at_once=self._at_once()).run()

    async def _draw_all(self, chunks: list[Chunk]) -> None:
        work = Work(self._fleet, chunks, self._draw, self._keep, at_once=self._at_once(), may_begin=self._may_begin)
        flusher = asyncio.create_task(self._flush_regularly())
        try:
            await work.run()
        finally:
            flusher.cancel()
            self._reporter.end()

    def _at_once(self) -> int:
        sequences = min(self._settings.chunk_size, self._settings.rollouts)
        return self._pace.at_once or self._fleet.calls_at_once(sequences)

    def _outcome(self, missing: int) -> Outcome:
        return Outcome(self._run, self._drawn, self._tokens, missing, time.monotonic() - self._begun_at)

    async def _draw(self, endpoint: Endpoint, chunk: Chunk) -> Completions:
        request = self._request(chunk)
        async with endpoint.client.generate(request, timeout_s=self._pace.call_timeout_s) as stream:
            event = await anext(stream)
            self._fleet.check(endpoint, event.started.pair_fingerprint)
            with self._fleet.streaming(endpoint, chunk):
                return await stream.gather()

    def _request(self, chunk: Chunk) -> pb.GenerateLDARequest:
        settings = self._settings
        return generate_request(
            self._prompts[chunk.prompt].message(chat=self._run.manifest.chat_template, system=settings.system),
            alpha=chunk.alpha,
            num_sequences=chunk.sequences,
            seed=chunk.seed,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            plausibility=settings.plausibility,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            ignore_eos=settings.ignore_eos,
            stop=settings.stop,
            stop_token_ids=settings.stop_token_ids,
            diagnostics=settings.diagnostics,
            max_tokens_per_event=TOKENS_PER_EVENT,
            score_alphas=settings.score_alphas,
        )

    def _keep(self, chunk: Chunk, drawn: Completions) -> None:
        """A chunk is finished once it is in the journal."""
        rows = chunk_rows(self._settings, chunk, self._prompts[chunk.prompt].id, drawn)
        self._journal.append(chunk.number, pack(rows))
        tokens = sum(completion.usage.output_token_count for completion in drawn)
        self._drawn += chunk.sequences
        self._tokens += tokens
        self._chunks_done += 1
        self._reporter.advance(chunk.sequences, tokens)

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S)
            await asyncio.to_thread(self._journal.flush)

    def _may_begin(self, running: int) -> bool:
        """Whether the budget has room for one more chunk beside those that are under way."""
        pace = self._pace
        if pace.budget_minutes is not None and time.monotonic() - self._begun_at >= 60 * pace.budget_minutes:
            return False
        if pace.budget_tokens is None:
            return True
        most = self._settings.chunk_size * self._settings.max_new_tokens
        expected = self._tokens / self._chunks_done if self._chunks_done else most
        return self._tokens + running * expected < pace.budget_tokens


def _require_same(run: Run, begun: Manifest, prompts: Sequence[Prompt]) -> None:
    """Raise if a run was begun with something else than it would be now."""
    then, now = run.settings.to_json(), begun.settings.to_json()
    differing = [f"{name} was {then[name]!r} and is now {now[name]!r}" for name in now if then[name] != now[name]]
    if run.manifest.prompts_sha256 != begun.prompts_sha256:
        differing.append(f"the prompts differ ({len(run.prompts())} then, {len(prompts)} now)")
    if differing:
        raise SettingsDiffer(
            f"{run.path}: was begun with other settings: {'; '.join(differing)}. "
            f"Go on as it was begun with `lda survey --resume {run.path}`, or give a new folder."
        )
    if run.manifest.pair["fingerprint"] != begun.pair["fingerprint"]:
        was = run.manifest.pair
        raise PairsDiffer(
            f"{run.path}: was drawn from {was['after']['model_id']} vs {was['before']['model_id']} "
            f"({was['fingerprint']}), and the server holds another pair ({begun.pair['fingerprint']}). "
            "Give a new folder."
        )


def _ignore(job: int, result: None) -> None:
    """Nothing is kept of a prompt that was admitted."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
