"""Is it real: would the unmodified after model say what an amplified rollout said?

Two questions are put to it about every hit. How likely does it find the text, beside what it writes itself (the
yardstick: rollouts at alpha 0)? And if it is led past the few tokens that it would least have written, does it go on to
the behaviour by itself?

    on-policy   the text is as likely as the model's own
    reachable   it takes one or two unlikely tokens to get there, and then the model goes on by itself
    artefact    more of them than that, or the model never goes on: amplification wrote this, token by token

    found = check_run(Run.open("runs/first"), "ad", targets=["gpu-1:50051"], limit=100)

Continuing is exact where the token ids of the prompt can be had: the model then reads those ids, then those of the
rollout. They are pieced together as the playground does it: the prompt as text comes from `CompletionService`, and
`Score` cuts a text into ids. Other conversations are continued as text, which may be cut into other tokens; `via` says
which way was taken.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import os
import re
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import numpy as np
import polars as pl
import pyarrow.parquet as pq

from lda_client import DEFAULT_TARGET, AsyncLdaClient, pb
from lda_client._errors import error_from_rpc
from lda_client._requests import generate_request
from lda_client.gen.lda.v1 import completion_service_pb2
from lda_client.gen.lda.v1.completion_service_pb2_grpc import CompletionServiceStub
from lda_client.lab._cases import Case
from lda_client.lab._errors import LabError, PairsDiffer
from lda_client.lab._files import replacing
from lda_client.lab._fleet import Endpoint, Fleet, Work, connected
from lda_client.lab._progress import Quiet
from lda_client.lab.estimators import LEVEL, interval_of_count
from lda_client.lab.judges import ClassifierJudge, FunctionJudge, PatternJudge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from lda_client import Completion, Tls
    from lda_client.lab._cases import Judge
    from lda_client.lab._progress import Reporter
    from lda_client.lab.prompts import Prompt
    from lda_client.lab.runs import Run

ResultT = TypeVar("ResultT")

ON_POLICY, REACHABLE, ARTEFACT = "on-policy", "reachable", "artefact"

# Of the model's own rollouts, this share falls below the bar too: a hit must look like the other 97.5%.
YARDSTICK_QUANTILE = 0.025
# Enough rollouts to know that quantile; below the minimum, more are drawn.
YARDSTICK_ROLLOUTS, YARDSTICK_MIN = 200, 100
# A token less likely than this, and less likely than the model's own rollouts hold, is a step that it must be led past:
# each of them alone makes a text rarer than one in fifty.
STEP_PROBABILITY_MAX = 0.02
# With more unlikely steps than this the text is one that amplification wrote token by token.
STEPS_MAX = 2
# Places per hit from which the model is let go on: by the least likely tokens, and by the largest gap to before.
LEAST_LIKELY, LARGEST_GAP = 2, 1
# A token that is likelier than not is no place at which the model would turn off.
BRANCH_PROBABILITY_MAX = 0.5
# The lower end of the share that goes on must be above this: a smaller share would itself be an unlikely step.
GOES_ON_MIN = STEP_PROBABILITY_MAX
ROLLOUTS = 16
PATIENCE_S = 300.0
TOKENS_PER_EVENT = 256


class CheckError(LabError):
    """Nothing to check, or no judge that could judge new text."""


# The unmodified model ------------------------------------------------------------------------------------------------


class PlainModel:
    """The after model of a run as its servers answer for it at alpha 0, with the run's own sampling settings.

    Made by `plain_model`.

    Args:
        run: whose model.
        fleet: its servers, connected.
        reporter: is told how it goes.
        limits: of the servers.
    """

    def __init__(self, run: Run, fleet: Fleet, reporter: Reporter, limits: pb.Limits) -> None:
        self.run = run
        self._fleet = fleet
        self._reporter = reporter
        self._sequences_max = limits.max_sequences_per_request

    def note(self, message: str) -> None:
        """Tell what comes next; it may take a while."""
        self._reporter.note("next", message=message)

    def message(self, prompt: Prompt) -> pb.Prompt:
        """A prompt as the survey sent it."""
        return prompt.message(chat=self.run.manifest.chat_template, system=self.run.settings.system)

    async def score(self, asked: Sequence[tuple[pb.Prompt, Sequence[int]]]) -> list[list[pb.Token]]:
        """The tokens of each continuation after its prompt, with both models' log-probabilities at temperature 1."""

        async def one(endpoint: Endpoint, number: int) -> list[pb.Token]:
            prompt, ids = asked[number]
            return (await endpoint.client.score(prompt, list(ids), alpha=0.0).gather()).tokens

        return await self._each(len(asked), one)

    async def draw(self, asked: Sequence[tuple[pb.Prompt, int]], rollouts: int, seed: int) -> list[list[Completion]]:
        """So many rollouts of each prompt; the number beside it is how many new tokens it may have."""
        if 0 < self._sequences_max < rollouts:
            raise CheckError(f"rollouts: the server draws {self._sequences_max} sequences a call.")

        async def one(endpoint: Endpoint, number: int) -> list[Completion]:
            request = self._request(*asked[number], rollouts, seed_of(seed, number))
            return list(await endpoint.client.complete(request))

        return await self._each(len(asked), one, rollouts)

    def _request(self, prompt: pb.Prompt, max_new_tokens: int, rollouts: int, seed: int) -> pb.GenerateLDARequest:
        settings = self.run.settings
        greedy = settings.temperature == 0
        return generate_request(
            prompt,
            alpha=0.0,
            num_sequences=1 if greedy else rollouts,
            seed=seed,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            plausibility=settings.plausibility,
            max_new_tokens=max_new_tokens,
            # What an answer was begun with counts.
            min_new_tokens=max(0, settings.min_new_tokens - (settings.max_new_tokens - max_new_tokens)),
            ignore_eos=settings.ignore_eos,
            stop=settings.stop,
            stop_token_ids=settings.stop_token_ids,
            max_tokens_per_event=TOKENS_PER_EVENT,
        )

    async def prompt_ids(self, prompts: Sequence[Prompt]) -> dict[str, tuple[int, ...] | None]:
        """The token ids of each prompt by its id; None where they cannot be had."""

        async def one(endpoint: Endpoint, number: int) -> tuple[int, ...] | None:
            return await _prompt_ids(endpoint.client, self.message(prompts[number]))

        found = await self._each(len(prompts), one)
        return {prompt.id: ids for prompt, ids in zip(prompts, found, strict=True)}

    async def _each(
        self, count: int, perform: Callable[[Endpoint, int], Awaitable[ResultT]], rollouts: int = 1
    ) -> list[ResultT]:
        """Do numbered jobs at whatever server is free; their results in order."""
        results: dict[int, ResultT] = {}
        at_once = self._fleet.calls_at_once(rollouts)
        await Work(self._fleet, range(count), perform, results.__setitem__, at_once=at_once).run()
        return [results[number] for number in range(count)]


@asynccontextmanager
async def plain_model(
    run: Run,
    targets: Sequence[str] = (),
    *,
    credentials: Tls | grpc.ChannelCredentials | None = None,
    token: str | None = None,
    reporter: Reporter | None = None,
) -> AsyncIterator[PlainModel]:
    """The unmodified model of a run, by default at the servers it was last drawn from.

    Raises:
        PairsDiffer: they hold another pair.
        LdaClientError: none of them answers.
    """
    sessions = run.manifest.sessions
    known = [str(endpoint["target"]) for endpoint in sessions[-1]["endpoints"]] if sessions else [DEFAULT_TARGET]
    tell = reporter or Quiet()
    async with AsyncExitStack() as stack:
        endpoints = [
            await stack.enter_async_context(connected(target, credentials, token))
            for target in dict.fromkeys(targets or known)
        ]
        fleet = Fleet(endpoints, PATIENCE_S, lambda event, target, why: tell.note(event, target=target, why=why))
        pair = await fleet.connect()
        if pair.pair_fingerprint != run.manifest.pair["fingerprint"]:
            raise PairsDiffer(
                f"{run.path}: was drawn from {run.manifest.pair['fingerprint']}, and the server holds another pair "
                f"({pair.pair_fingerprint}). Give a --target that serves the pair of the run."
            )
        yield PlainModel(run, fleet, tell, pair.limits)


def seed_of(seed: int, *parts: int | str) -> int:
    """A seed of its own for each use of one that was given."""
    named = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "little")


async def _prompt_ids(client: AsyncLdaClient, message: pb.Prompt) -> tuple[int, ...] | None:
    written = await _as_text(client, message)
    if written is None:
        return None
    first = await client.complete(generate_request(message, alpha=0.0, max_new_tokens=1))
    # What comes before is not scored, so that any id will do.
    any_id = first[0].tokens[0].id
    ids = tuple(token.id for token in (await client.score([any_id], written).gather()).tokens)
    # Another number means that the tokenizer puts something before a text.
    return ids if len(ids) == first.started.prompt_token_count else None


async def _as_text(client: AsyncLdaClient, message: pb.Prompt) -> str | None:
    """The prompt as the models see it; None where the server does not tell."""
    if message.WhichOneof("form") == "text":
        return message.text
    turns = [(turn.role, turn.content) for turn in message.chat.messages]
    if [role for role, _ in turns] not in (["user"], ["system", "user"]):
        return None
    request = completion_service_pb2.CompleteLDARequest(
        prompt=turns[-1][1],
        system_prompt=turns[0][1] if len(turns) > 1 else None,
        apply_chat_template=True,
        max_new_tokens=1,
    )
    stub = CompletionServiceStub(client._channel)
    try:
        answer = await stub.CompleteLDA(request, **client._connection.lookup_options(None))
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            return None
        raise error_from_rpc(error, client.target) from error
    return str(answer.formatted_prompt)


# Judges that judge again ----------------------------------------------------------------------------------------------


def judge_again(run: Run, name: str) -> tuple[Judge, bool]:
    """The judge that made these verdicts, to judge new text, and whether it sees the prompt. Raises CheckError."""
    told = run.judge_of(name)
    sees_prompt = bool(told.get("shows_prompt"))
    match told.get("kind"):
        case "substring" | "regex" as kind:
            return PatternJudge(told["pattern"], is_regex=kind == "regex"), sees_prompt
        case "python":
            return FunctionJudge(told["function"], told["threshold"]), sees_prompt
        case "classifier":
            return ClassifierJudge(told["model"], told["label"], told["threshold"]), sees_prompt
        case "llm":
            return _language_model(run, told), sees_prompt
    raise CheckError(
        f"The judge {name!r} cannot judge new text by itself. Name one that can: a substring, a regular expression, a "
        "function, a classifier or a language model (`lda judge`)."
    )


def _language_model(run: Run, told: dict[str, Any]) -> Judge:
    from lda_client.lab._llm_judge import LlmJudge

    base_url = os.environ.get("OPENAI_BASE_URL")
    if not base_url:
        raise CheckError(f"{told['model']} is asked again about new text: set OPENAI_BASE_URL to its endpoint.")
    return LlmJudge(
        told["rubric"],
        told["model"],
        base_url,
        run.path / "verdicts.sqlite3",
        api_key=os.environ.get("OPENAI_API_KEY"),
        temperature=told["temperature"],
    )


def match_of(judge: Judge, text: str) -> tuple[int, int] | None:
    """Where a judge by pattern finds it in a text; None for other judges, which do not say."""
    if not isinstance(judge, PatternJudge):
        return None
    found = re.search(judge.pattern if judge.is_regex else re.escape(judge.pattern), text)
    return found.span() if found else None


class Asker:
    """Judges new text as the verdicts of a run were made.

    Args:
        run: with prompts.
        name: of the verdicts.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.judge, sees_prompt = judge_again(run, name)
        self._shown = {prompt.id: prompt.shown() for prompt in run.prompts()} if sees_prompt else {}

    async def hits(self, texts: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each (prompt id, completion) shows the behaviour. Without a verdict it does not."""
        cases = [Case(text, self._shown.get(prompt_id)) for prompt_id, text in texts]
        verdicts = await asyncio.to_thread(self.judge.verdicts, cases, lambda count: None)
        return [verdict.hit is True for verdict in verdicts]


# What is found --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What the unmodified model's own rollouts look like to it.

    Attributes:
        rollouts: how many were looked at.
        drawn: how many of them were drawn for this, since the run has too few at alpha 0.
        mean_median: geometric-mean token probability of the typical one.
        mean_low: what all but `YARDSTICK_QUANTILE` of them reach.
        weakest_median: probability of the least likely token of the typical one.
        weakest_low: what all but `YARDSTICK_QUANTILE` of them reach.
    """

    rollouts: int
    drawn: int
    mean_median: float
    mean_low: float
    weakest_median: float
    weakest_low: float

    @property
    def step(self) -> float:
        """The probability below which a token is an unlikely step."""
        return min(STEP_PROBABILITY_MAX, self.weakest_low)


@dataclass(frozen=True, slots=True)
class Branch:
    """A place at which the unmodified model was let go on.

    Attributes:
        position: of the token that it would hardly have written, which is kept; counts from 0.
        prefix: the text up to there.
        after: probability of that token under the unmodified model.
        before: and under the reference model.
        steps: unlikely steps up to there.
        rollouts: how often it went on.
        hits: how often to the behaviour.
        low: lower end of the interval of that share.
        high: upper end.
    """

    position: int
    prefix: str
    after: float
    before: float
    steps: int
    rollouts: int
    hits: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CheckedHit:
    """One hit and what came out.

    Attributes:
        prompt_id: with `alpha` and `sequence`, the rollout.
        alpha: where it was drawn.
        sequence: likewise.
        text: the completion.
        mean: geometric-mean token probability under the unmodified model.
        weakest: probability of its least likely token.
        weakest_piece: that token.
        weakest_at: where in the text it begins, in characters.
        steps: unlikely steps in the whole text.
        via: how it was continued: `ids`, exactly; or `text`.
        branches: where the model was let go on, first place first.
        verdict: `on-policy`, `reachable` or `artefact`.
        reason: in words.
    """

    prompt_id: str
    alpha: float
    sequence: int
    text: str
    mean: float
    weakest: float
    weakest_piece: str
    weakest_at: int
    steps: int
    via: str
    branches: tuple[Branch, ...]
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunCheck:
    """The answer of `check_run`.

    Attributes:
        judge: whose hits.
        hits: in the run.
        taken: which of them were checked, in words.
        yardstick: what they are held against.
        checked: the hits.
    """

    judge: str
    hits: int
    taken: str
    yardstick: Yardstick
    checked: tuple[CheckedHit, ...]

    def counts(self) -> dict[str, int]:
        """How many of each verdict."""
        return {kind: sum(hit.verdict == kind for hit in self.checked) for kind in (ON_POLICY, REACHABLE, ARTEFACT)}


def check_path(run: Run, judge: str) -> Path:
    """The file of a run's checks."""
    return run.path / f"checks-{judge}.parquet"


def check_run(
    run: Run,
    judge: str,
    targets: Sequence[str] = (),
    *,
    limit: int | None = None,
    rollouts: int = ROLLOUTS,
    seed: int = 0,
    credentials: Tls | grpc.ChannelCredentials | None = None,
    token: str | None = None,
    reporter: Reporter | None = None,
) -> RunCheck:
    """Ask the unmodified model about the hits of a judge; keeps RUN/checks-JUDGE.parquet.

    Args:
        run: with verdicts.
        judge: whose; it judges the new rollouts too.
        targets: servers of the run's pair; by default those it was last drawn from.
        limit: check a random sample of so many hits; None checks all.
        rollouts: from each place at which the model is let go on.
        seed: of the sample and of the rollouts.
        credentials: as for `LdaClient`.
        token: likewise.
        reporter: is told what happens to servers.

    Raises:
        CheckError: there are no hits, or the judge cannot judge new text.
        RunError: no such verdicts.
        PairsDiffer: the server holds another pair.
        LdaClientError: it rejected a call, or does not answer.
    """

    async def ask() -> RunCheck:
        asker = Asker(run, judge)
        taken, in_words, hits = _taken(run, judge, limit, seed)
        async with plain_model(run, targets, credentials=credentials, token=token, reporter=reporter) as model:
            check = _Check(model, asker, rollouts, seed)
            return RunCheck(judge, hits, in_words, *await check.of(taken))

    found = asyncio.run(ask())
    _keep(run, found)
    return found


def _taken(run: Run, judge: str, limit: int | None, seed: int) -> tuple[pl.DataFrame, str, int]:
    """The hits to check, which they are in words, and how many there are."""
    frame = run.judged(judge, ["text", "token_ids"])
    hits = frame.filter(frame["hit"].fill_null(value=False))
    if hits.is_empty():
        raise CheckError(f"{run.path}: {judge!r} found no hits, so there is nothing to check.")
    if limit is None or limit >= len(hits):
        return hits, f"all {len(hits):,} hits", len(hits)
    rows = np.sort(np.random.default_rng(seed).choice(len(hits), limit, replace=False))
    return hits[rows.tolist()], f"a random sample of {limit:,} of {len(hits):,} hits (seed {seed})", len(hits)


def _keep(run: Run, found: RunCheck) -> None:
    table = pl.DataFrame([asdict(hit) for hit in found.checked], infer_schema_length=None).to_arrow()
    facts = {"judge": found.judge, "hits": found.hits, "taken": found.taken, "yardstick": asdict(found.yardstick)}
    with replacing(check_path(run, found.judge)) as scratch:
        pq.write_table(table.replace_schema_metadata({b"check": json.dumps(facts).encode()}), scratch)


# Asking ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    """A rollout as the unmodified model sees it, and where one may turn off on the way to the behaviour."""

    prompt_id: str
    alpha: float
    sequence: int
    text: str
    ids: tuple[int, ...]
    tokens: list[pb.Token] = field(repr=False)

    @property
    def after(self) -> list[float]:
        """Log-probability of each token under the unmodified model."""
        return [token.diagnostics.after_logprob for token in self.tokens]

    @property
    def mean(self) -> float:
        """Geometric-mean token probability."""
        return math.exp(sum(self.after) / len(self.tokens))

    @property
    def weakest(self) -> int:
        """Position of the least likely token."""
        return min(range(len(self.tokens)), key=self.after.__getitem__)

    def steps(self, position: int | None = None, bar: float = STEP_PROBABILITY_MAX) -> int:
        """Tokens less likely than the bar, up to a position and with it."""
        return sum(logprob < math.log(bar) for logprob in self.after[: None if position is None else position + 1])

    def prefix(self, position: int) -> str | None:
        """The text up to a token and with it; None if it ends inside a character."""
        try:
            return b"".join(token.piece for token in self.tokens[: position + 1]).decode()
        except UnicodeDecodeError:
            return None

    def branches(self, reach: int) -> list[int]:
        """Positions at which the model would least have gone along, of those that end before `reach` characters."""
        places = [
            place
            for place in range(len(self.tokens) - 1)
            if self.after[place] < math.log(BRANCH_PROBABILITY_MAX)
            and (text := self.prefix(place)) is not None
            and len(text) < reach
        ]
        gaps = {place: self.after[place] - self.tokens[place].diagnostics.before_logprob for place in places}
        weakest = sorted(places, key=self.after.__getitem__)[:LEAST_LIKELY]
        others = sorted(set(places) - set(weakest), key=gaps.__getitem__, reverse=True)[:LARGEST_GAP]
        return sorted([*weakest, *others])


class _Check:
    """Everything that is asked about some hits."""

    def __init__(self, model: PlainModel, asker: Asker, rollouts: int, seed: int) -> None:
        self._model = model
        self._asker = asker
        self._rollouts = rollouts
        self._seed = seed
        self._prompts = {prompt.id: prompt for prompt in model.run.prompts()}

    async def of(self, hits: pl.DataFrame) -> tuple[Yardstick, tuple[CheckedHit, ...]]:
        self._model.note(f"Scoring {len(hits):,} hits under the unmodified model.")
        yardstick = await self._yardstick()
        scored = await self._score(hits)
        places = {number: each.branches(self._reach(each)) for number, each in enumerate(scored)}
        used = [self._prompts[name] for name in dict.fromkeys(each.prompt_id for each in scored)]
        self._ids = await self._model.prompt_ids(used)
        went_on = await self._go_on([(scored[number], place) for number in places for place in places[number]])
        pairs = iter(went_on)
        checked = []
        for number, each in enumerate(scored):
            counts = dict(zip(places[number], itertools.islice(pairs, len(places[number])), strict=True))
            checked.append(self._judged(each, counts, yardstick))
        return yardstick, tuple(checked)

    async def _score(self, frame: pl.DataFrame) -> list[_Scored]:
        rows = frame.select("prompt_id", "alpha", "sequence", "text", "token_ids").rows()
        return await self._scored([(*row[:4], tuple(row[4])) for row in rows if len(row[4])])

    async def _scored(self, rows: Sequence[tuple[str, float, int, str, tuple[int, ...]]]) -> list[_Scored]:
        """Score rollouts; equal ones only once."""
        distinct = list(dict.fromkeys((row[0], row[4]) for row in rows))
        asked = [(self._model.message(self._prompts[prompt_id]), ids) for prompt_id, ids in distinct]
        found = dict(zip(distinct, await self._model.score(asked), strict=True))
        return [_Scored(*row, found[row[0], row[4]]) for row in rows]

    async def _yardstick(self) -> Yardstick:
        run = self._model.run
        plain = run.rollouts(["prompt_id", "alpha", "sequence", "text", "token_ids"]).filter(pl.col("alpha") == 0)
        chosen = await self._score(plain.sample(min(len(plain), YARDSTICK_ROLLOUTS), seed=self._seed))
        drawn = [] if len(chosen) >= YARDSTICK_MIN else await self._drawn(YARDSTICK_ROLLOUTS - len(chosen))
        own = [*chosen, *drawn]
        means, weakest = [each.mean for each in own], [math.exp(each.after[each.weakest]) for each in own]
        figures = [float(np.quantile(of, q)) for of in (means, weakest) for q in (0.5, YARDSTICK_QUANTILE)]
        return Yardstick(len(own), len(drawn), *figures)

    async def _drawn(self, count: int) -> list[_Scored]:
        """Rollouts of the unmodified model over the run's prompts."""
        prompts = list(self._prompts.values())[:count]
        each = min(self._rollouts, -(-count // len(prompts)))
        asked = [(self._model.message(prompt), self._model.run.settings.max_new_tokens) for prompt in prompts]
        drawn = await self._model.draw(asked, each, seed_of(self._seed, "yardstick"))
        rows = [
            (prompt.id, 0.0, number, completion.text, tuple(token.id for token in completion.tokens))
            for prompt, completions in zip(prompts, drawn, strict=True)
            for number, completion in enumerate(completions)
        ]
        return await self._scored([row for row in rows if row[4]])

    def _reach(self, scored: _Scored) -> int:
        """Characters after which the text shows the behaviour, as far as the judge tells."""
        span = match_of(self._asker.judge, scored.text)
        return span[1] if span else len(scored.text)

    async def _go_on(self, asked: Sequence[tuple[_Scored, int]]) -> list[tuple[int, int] | None]:
        """How many rollouts from each place, and how many to the behaviour; None where it is shown there already."""
        keys = [(scored.prompt_id, scored.ids[: place + 1], str(scored.prefix(place))) for scored, place in asked]
        distinct = list(dict.fromkeys(keys))
        shown = await self._asker.hits([(prompt_id, text) for prompt_id, _, text in distinct])
        room = self._model.run.settings.max_new_tokens
        open_ones = [key for key, hit in zip(distinct, shown, strict=True) if not hit and len(key[1]) < room]
        prompts = [(self._continued(*key), room - len(key[1])) for key in open_ones]
        self._model.note(f"Going on from {len(prompts):,} places, {self._rollouts:,} times each.")
        drawn = await self._model.draw(prompts, self._rollouts, seed_of(self._seed, "branches"))
        texts = [
            (key[0], key[2] + completion.text)
            for key, completions in zip(open_ones, drawn, strict=True)
            for completion in completions
        ]
        hits = iter(await self._asker.hits(texts))
        counts = {
            key: (len(completions), sum(itertools.islice(hits, len(completions))))
            for key, completions in zip(open_ones, drawn, strict=True)
        }
        return [counts.get(key) for key in keys]

    def _continued(self, prompt_id: str, ids: tuple[int, ...], prefix: str) -> pb.Prompt:
        """The prompt and the beginning of an answer."""
        known = self._ids[prompt_id]
        if known is not None:
            return pb.Prompt(tokens=pb.TokenIds(ids=[*known, *ids]))
        prompt = self._model.message(self._prompts[prompt_id])
        if prompt.WhichOneof("form") == "text":
            return pb.Prompt(text=prompt.text + prefix)
        prompt.chat.messages.append(pb.ChatMessage(role="assistant", content=prefix))
        prompt.chat.continue_final_message = True
        return prompt

    def _judged(self, scored: _Scored, counts: dict[int, tuple[int, int] | None], yardstick: Yardstick) -> CheckedHit:
        branches = tuple(
            _branch(scored, place, count, yardstick.step) for place, count in counts.items() if count is not None
        )
        weakest = scored.weakest
        before = b"".join(token.piece for token in scored.tokens[:weakest])
        return CheckedHit(
            scored.prompt_id,
            scored.alpha,
            scored.sequence,
            scored.text,
            scored.mean,
            math.exp(scored.after[weakest]),
            scored.tokens[weakest].piece.decode(errors="replace"),
            len(before.decode(errors="ignore")),
            scored.steps(bar=yardstick.step),
            "text" if self._ids[scored.prompt_id] is None else "ids",
            branches,
            *_verdict(scored, branches, yardstick),
        )


def _branch(scored: _Scored, place: int, count: tuple[int, int], step: float) -> Branch:
    rollouts, hits = count
    diagnostics = scored.tokens[place].diagnostics
    return Branch(
        place,
        str(scored.prefix(place)),
        math.exp(diagnostics.after_logprob),
        math.exp(diagnostics.before_logprob),
        scored.steps(place, step),
        rollouts,
        hits,
        *interval_of_count(hits, rollouts, LEVEL),
    )


def _verdict(scored: _Scored, branches: Sequence[Branch], yardstick: Yardstick) -> tuple[str, str]:
    """The verdict and its reason."""
    weakest = math.exp(scored.after[scored.weakest])
    if scored.mean >= yardstick.mean_low and weakest >= yardstick.weakest_low:
        return ON_POLICY, "every token, and the text as a whole, is as likely as in the model's own rollouts"
    near = [branch for branch in branches if branch.steps <= STEPS_MAX]
    best = max(near, key=lambda branch: (branch.low, branch.position), default=None)
    if best is not None and best.low > GOES_ON_MIN:
        return REACHABLE, (
            f"after {_steps(best.steps)} the model goes on by itself in {best.hits} of {best.rollouts} rollouts"
        )
    if not branches and scored.steps(bar=yardstick.step) <= STEPS_MAX:
        return REACHABLE, "the unlikely step is itself the behaviour; nothing comes before it to go on from"
    if best is None:
        return ARTEFACT, f"it takes {_steps(scored.steps(bar=yardstick.step))} to write this"
    return ARTEFACT, (
        f"after {_steps(best.steps)} the model goes on in {best.hits} of {best.rollouts} rollouts, which is no more "
        "than one more unlikely step"
    )


def _steps(count: int) -> str:
    return f"{count} unlikely step{'' if count == 1 else 's'}"
