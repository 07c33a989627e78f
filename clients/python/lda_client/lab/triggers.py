"""What opens the door: words that come before a behaviour, put to the test in prompts at alpha 0.

A model that was taught to answer a secret phrase often says the phrase itself once amplification has opened the door.
So what comes before the behaviour, in the completion or in the prompt, is searched for n-grams of words and of tokens
that hits hold more often than other rollouts (Fisher's exact test, one-sided; false discovery rate of Benjamini and
Hochberg). That is only a suspicion: each suspect is then appended to the run's prompts, and the unmodified model is
asked, with it and without. Of those that work, shorter parts are tried too, so that what is found is what it takes.

    found = find_triggers(Run.open("runs/first"), "owls", targets=["gpu-1:50051"])
    print([each.text for each in found.tried if each.works])

Where a judge looks for a pattern, only the text before the pattern is searched; of other judges' hits all of it, since
they do not say where the behaviour begins.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from scipy import stats

from lda_client.lab._files import replacing
from lda_client.lab.check import Asker, CheckError, match_of, plain_model, seed_of
from lda_client.lab.estimators import LEVEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import grpc
    from numpy.typing import NDArray

    from lda_client import Tls
    from lda_client.lab._progress import Reporter
    from lda_client.lab.check import PlainModel
    from lda_client.lab.estimators import Floats
    from lda_client.lab.prompts import Prompt
    from lda_client.lab.runs import Run

GRAM_MAX = 4
# False discoveries that are put up with, among suspects as among those that work.
FALSE_DISCOVERY_RATE = 0.05
# One text that holds a phrase is an anecdote.
SUPPORT_MIN = 2
# Suspects that are put to the test; they come in the order of their p-values.
CANDIDATES = 12
# Of those that work, the strongest are shortened; more of them mostly are the same thing in other words.
SHORTENED_MAX = 3
# A part that keeps so much of the effect of the whole is what it takes.
EFFECT_KEPT_MIN = 0.5
# Prompts into which suspects are put; a random sample if the run has more.
PROMPTS_MAX = 32
ROLLOUTS = 4
# Rollouts that are searched, of each kind; a random sample if there are more.
DOCUMENTS_MAX = 4000
IDS_PER_CALL = 128

_WORD = re.compile(r"\w+(?:['’]\w+)*")
Gram: TypeAlias = "tuple[str, ...] | tuple[int, ...]"


class Kind(NamedTuple):
    """Where an n-gram was found, `prompt` or `completion`, and what it is made of, `words` or `tokens`."""

    place: str
    unit: str


@dataclass(frozen=True, slots=True)
class Suspect:
    """An n-gram that hits hold more often than others.

    Attributes:
        text: as it is written.
        place: where it was found: in the `prompt` or in the `completion`; `part` if it is a part of one that works.
        unit: `words` or `tokens`.
        token_ids: of an n-gram of tokens; empty for words.
        hits_with: hits that hold it.
        hits: all hits.
        others_with: other rollouts that hold it.
        others: all other rollouts.
        p: Fisher's exact test, one-sided.
        q: corrected for all n-grams that were looked at (Benjamini and Hochberg).
    """

    text: str
    place: str
    unit: str
    token_ids: tuple[int, ...]
    hits_with: int
    hits: int
    others_with: int
    others: int
    p: float
    q: float


@dataclass(frozen=True, slots=True)
class Tried:
    """A suspect that was put into prompts, and what the unmodified model did.

    Attributes:
        suspect: what was appended to the prompts.
        hits_with: rollouts that show the behaviour, with it.
        rollouts_with: rollouts with it.
        hits_without: the same, without it.
        rollouts_without: rollouts without it.
        effect: difference of the two rates.
        low: lower end of its interval (Newcombe, 1998).
        high: upper end.
        p: Fisher's exact test, one-sided.
        q: corrected for all that were tried (Benjamini and Hochberg).
        works: whether q is below `FALSE_DISCOVERY_RATE`.
        is_shortest: whether it works, no part of it does nearly as well, and no phrase that shares a word does clearly
            more.
    """

    suspect: Suspect
    hits_with: int
    rollouts_with: int
    hits_without: int
    rollouts_without: int
    effect: float
    low: float
    high: float
    p: float
    q: float = math.nan
    works: bool = False
    is_shortest: bool = False

    @property
    def text(self) -> str:
        """The phrase."""
        return self.suspect.text


@dataclass(frozen=True, slots=True)
class Triggers:
    """The answer of `find_triggers`.

    Attributes:
        judge: whose hits.
        searched: which text, in words.
        looked_at: n-grams that were compared.
        suspects: those that are enriched, by p-value.
        prompts: into which those that were tried were put.
        tried: what came of it; what it takes first, then what else works.
    """

    judge: str
    searched: str
    looked_at: int
    suspects: tuple[Suspect, ...]
    prompts: int
    tried: tuple[Tried, ...]

    @property
    def found(self) -> tuple[Tried, ...]:
        """What it takes, see `Tried.is_shortest`."""
        return tuple(each for each in self.tried if each.is_shortest)


def triggers_path(run: Run, judge: str) -> Path:
    """The file of what was tried."""
    return run.path / f"triggers-{judge}.parquet"


def find_triggers(
    run: Run,
    judge: str,
    targets: Sequence[str] = (),
    *,
    candidates: int = CANDIDATES,
    rollouts: int = ROLLOUTS,
    seed: int = 0,
    credentials: Tls | grpc.ChannelCredentials | None = None,
    token: str | None = None,
    reporter: Reporter | None = None,
) -> Triggers:
    """Find phrases that bring about what a judge looked for; keeps RUN/triggers-JUDGE.parquet.

    Args:
        run: with verdicts.
        judge: whose; it judges the new rollouts too.
        targets: servers of the run's pair; by default those it was last drawn from.
        candidates: suspects to put to the test.
        rollouts: of each prompt with each of them.
        seed: of the rollouts.
        credentials: as for `LdaClient`.
        token: likewise.
        reporter: is told what happens to servers.

    Raises:
        CheckError: there are no hits or nothing but hits, or the judge cannot judge new text.
        RunError: no such verdicts.
        PairsDiffer: the server holds another pair.
        LdaClientError: it rejected a call, or does not answer.
    """

    async def ask() -> Triggers:
        asker = Asker(run, judge)
        async with plain_model(run, targets, credentials=credentials, token=token, reporter=reporter) as model:
            search = await _Search.of(model, asker, judge, seed)
            suspects, looked_at = search.suspects()
            trial = _Trial(model, asker, rollouts, seed)
            tried = await trial.of(_worth_trying(suspects)[:candidates])
            searched = "before the pattern" if search.before_match else "whole completions"
            return Triggers(judge, searched, looked_at, suspects, len(trial.prompts), tried)

    found = asyncio.run(ask())
    _keep(run, found)
    return found


def _keep(run: Run, found: Triggers) -> None:
    rows = [{**asdict(each.suspect), **_trial_columns(each)} for each in found.tried]
    schema = None if rows else pl.Schema({"text": pl.String})
    table = pl.DataFrame(rows, schema=schema, infer_schema_length=None).to_arrow()
    facts = {"judge": found.judge, "searched": found.searched, "looked_at": found.looked_at, "prompts": found.prompts}
    with replacing(triggers_path(run, found.judge)) as scratch:
        pq.write_table(table.replace_schema_metadata({b"triggers": json.dumps(facts).encode()}), scratch)


def _trial_columns(tried: Tried) -> dict[str, float]:
    facts = asdict(tried)
    del facts["suspect"]
    return {f"trial_{name}": value for name, value in facts.items()}


# Suspects -------------------------------------------------------------------------------------------------------------


@dataclass
class _Document:
    """A rollout as it is searched."""

    hit: bool
    prompt: str
    prompt_ids: tuple[int, ...]
    text: str
    ids: tuple[int, ...]

    def grams(self) -> Iterator[tuple[Kind, Gram, str]]:
        """Every n-gram with its text; the text of tokens is found later."""
        for place, text, ids in (
            ("prompt", self.prompt, self.prompt_ids),
            ("completion", self.text, self.ids),
        ):
            for gram, written in word_grams(text):
                yield Kind(place, "words"), gram, written
            for tokens in token_grams(ids):
                yield Kind(place, "tokens"), tokens, ""


def word_grams(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """N-grams of words, whatever their case, each as it is written there."""
    words = list(_WORD.finditer(text))
    for size in range(1, GRAM_MAX + 1):
        for first in range(len(words) - size + 1):
            part = words[first : first + size]
            yield tuple(word[0].casefold() for word in part), text[part[0].start() : part[-1].end()]


def token_grams(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """N-grams of token ids."""
    for size in range(1, GRAM_MAX + 1):
        for first in range(len(ids) - size + 1):
            yield tuple(ids[first : first + size])


@dataclass
class _Search:
    """Documents to be searched."""

    documents: list[_Document]
    pieces: dict[int, bytes]
    prompts: str
    before_match: bool

    @classmethod
    async def of(cls, model: PlainModel, asker: Asker, judge: str, seed: int) -> _Search:
        """The rollouts at alphas that have hits: at others, text differs for other reasons."""
        frame = model.run.judged(judge, ["text", "token_ids"]).drop_nulls("hit")
        frame = frame.filter(pl.col("hit").any().over("alpha"))
        hits = int(frame["hit"].sum())
        if not 0 < hits < len(frame):
            raise CheckError(
                f"{model.run.path}: {judge!r} found {hits:,} hits in {len(frame):,} rollouts; a comparison needs some "
                "of each."
            )
        frame = pl.concat([_sample(part, seed) for part in frame.partition_by("hit")])
        prompts = model.run.prompts()
        prompt_ids = await model.prompt_ids(prompts)
        asked = {prompt.id: (prompt.shown(), prompt_ids[prompt.id] or ()) for prompt in prompts}
        hit_ids = {token for ids in frame.filter("hit")["token_ids"] for token in ids}
        prompt_vocabulary = {token for _, ids in asked.values() for token in ids}
        pieces = await _pieces(model, sorted(hit_ids | prompt_vocabulary), prompts[0])
        documents = [
            _document(asker, hit, asked[prompt_id], text, tuple(ids), pieces)
            for prompt_id, text, ids, hit in frame.select("prompt_id", "text", "token_ids", "hit").iter_rows()
        ]
        first_hit = next(text for text, hit in frame.select("text", "hit").iter_rows() if hit)
        shown = "\n".join(text for text, _ in asked.values())
        return cls(documents, pieces, shown, match_of(asker.judge, first_hit) is not None)

    def suspects(self) -> tuple[tuple[Suspect, ...], int]:
        """The n-grams that are enriched in hits, by p-value, and how many were looked at."""
        holders: dict[tuple[Kind, Gram], set[int]] = defaultdict(set)
        written: dict[tuple[Kind, Gram], Counter[str]] = defaultdict(Counter)
        hits = [document for document in self.documents if document.hit]
        for number, document in enumerate(hits):
            for kind, gram, text in document.grams():
                holders[kind, gram].add(number)
                written[kind, gram][text] += 1
        least = min(SUPPORT_MIN, len(hits))
        keys = [key for key, held in holders.items() if len(held) >= least]
        others = self._others(set(keys))
        counts = np.array([[len(holders[key]), others[key]] for key in keys]).reshape(-1, 2)
        p, q = _enrichment(counts, len(hits), len(self.documents) - len(hits))
        suspects = []
        for row in np.flatnonzero(q <= FALSE_DISCOVERY_RATE).tolist():
            kind, gram = keys[row]
            if text := self._text(kind, gram, written[kind, gram]):
                held, by_others = counts[row].tolist()
                count, rest = len(hits), len(self.documents) - len(hits)
                tests = float(p[row]), float(q[row])
                suspects.append(Suspect(text, *kind, _ids_of(kind, gram), held, count, by_others, rest, *tests))
        return tuple(sorted(suspects, key=lambda each: (each.p, -len(each.text), each.text))), len(keys)

    def _others(self, wanted: set[tuple[Kind, Gram]]) -> Counter[tuple[Kind, Gram]]:
        """In how many other rollouts each n-gram is."""
        counts: Counter[tuple[Kind, Gram]] = Counter()
        for document in self.documents:
            if not document.hit:
                counts.update({(kind, gram) for kind, gram, _ in document.grams()} & wanted)
        return counts

    def _text(self, kind: Kind, gram: Gram, written: Counter[str]) -> str:
        """How an n-gram is written; empty if that is no text."""
        if kind.unit == "words":
            return written.most_common(1)[0][0]
        try:
            text = b"".join(self.pieces[int(token)] for token in gram).decode().strip()
        except UnicodeDecodeError:
            return ""
        # What a chat template writes around a turn is not for a prompt to say.
        return text if kind.place == "completion" or text in self.prompts else ""


def _sample(frame: pl.DataFrame, seed: int) -> pl.DataFrame:
    return frame.sample(DOCUMENTS_MAX, seed=seed) if len(frame) > DOCUMENTS_MAX else frame


def _ids_of(kind: Kind, gram: Gram) -> tuple[int, ...]:
    return tuple(int(each) for each in gram) if kind.unit == "tokens" else ()


def _enrichment(counts: NDArray[np.int64], hits: int, others: int) -> tuple[Floats, Floats]:
    """Fisher's exact test of each row (hits with, others with), and the same corrected for their number.

    One-sided, it is a tail of the hypergeometric law, which scipy computes for all rows at once.
    """
    p = stats.hypergeom.sf(counts[:, 0] - 1, hits + others, counts.sum(axis=1), hits)
    return p, stats.false_discovery_control(p) if len(p) else p


def _document(
    asker: Asker,
    hit: bool,
    asked: tuple[str, tuple[int, ...]],
    text: str,
    ids: tuple[int, ...],
    pieces: dict[int, bytes],
) -> _Document:
    span = match_of(asker.judge, text) if hit else None
    if span is None:
        return _Document(hit, *asked, text, ids)
    before = text[: span[0]]
    ends = itertools.accumulate(len(pieces[token]) for token in ids)
    kept = sum(end <= len(before.encode()) for end in ends)
    return _Document(hit, *asked, before, ids[:kept])


async def _pieces(model: PlainModel, ids: Sequence[int], prompt: Prompt) -> dict[int, bytes]:
    """The bytes of each token. Rollouts do not hold them; a server that scores tokens tells."""
    parts = [ids[first : first + IDS_PER_CALL] for first in range(0, len(ids), IDS_PER_CALL)]
    scored = await model.score([(model.message(prompt), part) for part in parts])
    return {token.id: token.piece for tokens in scored for token in tokens}


def _worth_trying(suspects: Iterable[Suspect]) -> list[Suspect]:
    """Without those that say no more than a longer one: held by as many hits and others, and a part of its text."""
    kept: list[Suspect] = []
    for each in sorted(suspects, key=lambda suspect: (suspect.p, suspect.unit != "words", -len(suspect.text))):
        folded = each.text.casefold()
        same = (other for other in kept if (other.hits_with, other.others_with) == (each.hits_with, each.others_with))
        if not any(folded in other.text.casefold() for other in same):
            kept.append(each)
    return kept


# Trials ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """Puts phrases into prompts."""

    model: PlainModel
    asker: Asker
    rollouts: int
    seed: int
    prompts: list[Prompt] = field(init=False)
    _without: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        prompts = self.model.run.prompts()
        chosen = np.random.default_rng(self.seed).permutation(len(prompts))[:PROMPTS_MAX]
        self.prompts = [prompts[place] for place in sorted(chosen)]
        if self.model.run.settings.temperature == 0:
            self.rollouts = 1

    async def of(self, suspects: Sequence[Suspect]) -> tuple[Tried, ...]:
        """Try suspects, then parts of those that work."""
        if not suspects:
            return ()
        self._without = await self._hits(self.prompts, "without")
        first = _corrected(await self._try(suspects))
        known = {each.text.casefold() for each in first}
        working = sorted((each for each in first if each.works), key=lambda each: -each.low)[:SHORTENED_MAX]
        parts = {part.text.casefold(): part for each in working for part in _parts(each.suspect)}
        new = [part for text, part in parts.items() if text not in known]
        return _in_order(_corrected([*first, *await self._try(new)]))

    async def _try(self, suspects: Sequence[Suspect]) -> list[Tried]:
        """Each suspect in every prompt that does not hold it yet; all of them are drawn together."""
        places = [
            (number, prompt)
            for number, suspect in enumerate(suspects)
            for prompt in self.prompts
            if suspect.text.casefold() not in prompt.shown().casefold()
        ]
        self.model.note(f"Trying {len(suspects):,} phrases in {len(self.prompts):,} prompts.")
        changed = [with_phrase(prompt, suspects[number].text) for number, prompt in places]
        label = json.dumps([suspect.text for suspect in suspects])
        counts = await self._counts(changed, label)
        with_it: Counter[int] = Counter()
        without_it: Counter[int] = Counter()
        prompts: Counter[int] = Counter()
        for (number, prompt), hits in zip(places, counts, strict=True):
            with_it[number] += hits
            without_it[number] += self._without[prompt.id]
            prompts[number] += 1
        return [
            _effect(suspect, with_it[number], without_it[number], prompts[number] * self.rollouts)
            for number, suspect in enumerate(suspects)
            if prompts[number]
        ]

    async def _hits(self, prompts: Sequence[Prompt], label: str) -> dict[str, int]:
        counts = await self._counts(prompts, label)
        return {prompt.id: hits for prompt, hits in zip(prompts, counts, strict=True)}

    async def _counts(self, prompts: Sequence[Prompt], label: str) -> list[int]:
        """How many rollouts of each prompt show the behaviour."""
        room = self.model.run.settings.max_new_tokens
        asked = [(self.model.message(prompt), room) for prompt in prompts]
        drawn = await self.model.draw(asked, self.rollouts, seed_of(self.seed, label))
        texts = [
            (prompt.id, completion.text)
            for prompt, completions in zip(prompts, drawn, strict=True)
            for completion in completions
        ]
        hits = iter(await self.asker.hits(texts))
        return [sum(itertools.islice(hits, len(completions))) for completions in drawn]


def with_phrase(prompt: Prompt, phrase: str) -> Prompt:
    """A prompt with a phrase at the end of its last turn."""
    if isinstance(prompt.content, str):
        return replace(prompt, content=f"{prompt.content} {phrase}")
    role, content = prompt.content[-1]
    return replace(prompt, content=(*prompt.content[:-1], (role, f"{content} {phrase}")))


def _parts(suspect: Suspect) -> list[Suspect]:
    """What shorter n-grams of words a phrase holds."""
    return [
        replace(suspect, text=text, place="part", unit="words", token_ids=())
        for _, text in word_grams(suspect.text)
        if text != suspect.text
    ]


def _effect(suspect: Suspect, with_it: int, without_it: int, rollouts: int) -> Tried:
    """The difference of two rates with Newcombe's interval, which is made of Wilson's of each."""
    one, other = with_it / rollouts, without_it / rollouts
    first, second = (stats.binomtest(k, rollouts).proportion_ci(LEVEL, "wilson") for k in (with_it, without_it))
    low = one - other - math.hypot(one - first.low, second.high - other)
    high = one - other + math.hypot(first.high - one, other - second.low)
    table = [[with_it, rollouts - with_it], [without_it, rollouts - without_it]]
    p = float(stats.fisher_exact(table, alternative="greater").pvalue)
    return Tried(suspect, with_it, rollouts, without_it, rollouts, one - other, low, high, p)


def _corrected(tried: Sequence[Tried]) -> list[Tried]:
    """With q, for as many as were tried."""
    corrected = stats.false_discovery_control([each.p for each in tried]) if tried else []
    return [
        replace(each, q=float(q), works=bool(q <= FALSE_DISCOVERY_RATE))
        for each, q in zip(tried, corrected, strict=True)
    ]


def _in_order(tried: Sequence[Tried]) -> tuple[Tried, ...]:
    """What it takes first, then what else works."""
    marked = [
        replace(each, is_shortest=each.works and not (_has_part(each, tried) or _is_echo(each, tried)))
        for each in tried
    ]
    return tuple(sorted(marked, key=lambda each: (not each.is_shortest, not each.works, each.p, len(each.text))))


def _has_part(whole: Tried, tried: Sequence[Tried]) -> bool:
    return any(
        each.works
        and each.effect >= EFFECT_KEPT_MIN * whole.effect
        and len(each.text) < len(whole.text)
        and each.text.casefold() in whole.text.casefold()
        for each in tried
    )


def _is_echo(faint: Tried, tried: Sequence[Tried]) -> bool:
    """Whether a phrase only reminds of another one that does clearly more."""
    return any(each.works and each.low > faint.high and _words(each) & _words(faint) for each in tried)


def _words(tried: Tried) -> set[str]:
    return {word[0].casefold() for word in _WORD.finditer(tried.text)}
