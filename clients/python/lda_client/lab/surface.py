"""What amplified rollouts say that ordinary ones do not, without being told what to look for.

    found = surface_run(Run.open("runs/first"))
    for finding in found.findings:
        print(finding.phrase, finding.ratio_low, finding.regex)

Phrases are counted, one to five words or characters long, each rollout once. If amplification changed nothing, a
rollout that holds a phrase is as likely an amplified one as any other rollout of its prompt: given how many rollouts of
each prompt hold it, those among them that were amplified are a sum of hypergeometric counts, as in the exact form of
the test of Cochran, Mantel and Haenszel. Its tail is at most that of the binomial with the same mean (Hoeffding, 1956,
through scipy), which is what is used: valid for any counts, and close to exact for phrases that are rare. The false
discovery rate is kept by Benjamini and Hochberg, over every phrase that was counted.

Significant phrases that come with the same rollouts are one finding. The findings are tested again as such, so that the
many phrases of one behaviour make no room for false ones.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import cluster, sparse, special, stats
from scipy.spatial.distance import squareform

from lda_client.lab._errors import LabError
from lda_client.lab.estimate import AlphaRate, estimates_of
from lda_client.lab.estimators import interval_of_count
from lda_client.lab.judges import PatternJudge, judge_run
from lda_client.lab.runs import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import polars as pl
    from numpy.typing import NDArray

    from lda_client.lab.estimators import Estimate, Floats
    from lda_client.lab.runs import Run

    Ints = NDArray[np.int64]
    Flags = NDArray[np.bool_]

FDR = 0.05
LONGEST = 5  # words, or characters
ROLLOUTS_MIN = 5  # a phrase in fewer is an anecdote
SAME = 0.9  # Jaccard similarity from which two phrases have the same rollouts
TOGETHER = 0.5  # and from which they belong to one finding
INSIDE = 0.7  # share of a finding's rollouts that lie in another, beyond chance, from which it is a part of it
PHRASES_MAX = 1500  # the most telling; those beyond them would cost time and tell the same
OTHERS_MAX, EXAMPLES = 8, 3
LEVEL = 0.95

REPETITION, BROKEN = "repetition", "broken characters"
WORDS_TO_REPEAT_MIN, CHARACTERS_TO_REPEAT_MIN = 24, 80
DISTINCT_WORDS_MIN, DISTINCT_CHARACTERS_MIN = 0.5, 0.3  # of word 3-grams, and of character 8-grams
BROKEN_MAX = 0.02
_BROKEN_CHARACTER = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]")
# Thai, Lao, Myanmar, Khmer; all of East Asia.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]")
_WORD = re.compile(r"\w+")


class SurfaceError(LabError):
    """A run in which there is nothing to compare, or a finding that is not there."""


@dataclass(frozen=True, slots=True)
class Example:
    """A completion.

    Attributes:
        prompt_id: its prompt.
        alpha: where it was drawn.
        text: the completion.
        start: where what was found begins in it.
        end: where it ends.
    """

    prompt_id: str
    alpha: float
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that amplified rollouts say more often than ordinary ones.

    Attributes:
        phrase: the most telling words, as they were written most often.
        regex: which completions hold it; a judge of the kind `regex`.
        others: further phrases that come with it, the most telling first.
        ratio: how many times as often as in ordinary rollouts of the same prompts.
        ratio_low: lower end of its 95% interval, by which findings are ranked.
        q_value: share of false findings among those that are as significant.
        prompts: how many it was seen with.
        by_alpha: how many rollouts hold it at each alpha.
        estimates: of its rate at alpha 0; empty if the rollouts have no scores.
        examples: completions, from the alphas nearest to 0.
    """

    phrase: str
    regex: str
    others: tuple[str, ...]
    ratio: float
    ratio_low: float
    q_value: float
    prompts: int = 0
    by_alpha: tuple[AlphaRate, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, slots=True)
class Artefact:
    """Rollouts that are no language any more, and were left out of the comparison.

    Attributes:
        kind: `repetition` or `broken characters`.
        by_alpha: how many there are at each alpha.
        examples: some of them.
    """

    kind: str
    by_alpha: tuple[AlphaRate, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Surface:
    """The answer of `surface_run`.

    Attributes:
        amplified: the alphas whose rollouts were looked through.
        ordinary: the alphas whose rollouts they were compared with.
        amplified_rollouts: that were compared.
        ordinary_rollouts: that were compared.
        phrases: how many were tested.
        findings: the first of them, best first.
        more: findings that were left out.
        artefacts: rollouts that were left out, by kind.
    """

    amplified: tuple[float, ...]
    ordinary: tuple[float, ...]
    amplified_rollouts: int
    ordinary_rollouts: int
    phrases: int
    findings: tuple[Finding, ...]
    more: int
    artefacts: tuple[Artefact, ...]


def surface_run(
    run: Run,
    alphas: Sequence[float] = (),
    against: Sequence[float] = (0.0,),
    fdr: float = FDR,
    top: int = 20,
) -> Surface:
    """What the amplified rollouts of a run say that its ordinary ones do not.

    Args:
        run: of a survey, at alpha 0 and at others.
        alphas: of the amplified rollouts; by default all above those of `against`.
        against: of the ordinary rollouts; 0 is the unmodified model, -1 the one before its training.
        fdr: the share of false findings that is allowed.
        top: findings to describe.

    Raises:
        SurfaceError: there is nothing to compare.
    """
    columns = [*KEY, "text", *(["score_logprobs"] if run.manifest.score_alphas else [])]
    frame = run.rollouts(columns)
    amplified, ordinary = _sides(run, frame, alphas, against)
    texts = frame["text"].to_list()
    kinds = np.array([degeneration(text) for text in texts])
    alpha = frame["alpha"].to_numpy()
    is_amplified = np.isin(alpha, amplified)
    kept = np.flatnonzero((is_amplified | np.isin(alpha, ordinary)) & (kinds == ""))
    _, prompts = np.unique(frame["prompt_id"].to_numpy(), return_inverse=True)
    enriched, phrases = find_enriched(
        [texts[place] for place in kept], prompts[kept], alpha[kept], is_amplified[kept], fdr
    )
    found = [_described(run, frame, texts, amplified, finding) for finding in enriched[:top]]
    artefacts = [
        Artefact(kind, _by_alpha(alpha, kinds == kind), _examples(frame, texts, kinds == kind, None))
        for kind in (REPETITION, BROKEN)
        if (kinds == kind).any()
    ]
    count = int(is_amplified[kept].sum())
    return Surface(
        amplified, ordinary, count, len(kept) - count, phrases, tuple(found), len(enriched) - len(found),
        tuple(artefacts),
    )  # fmt: skip


def save_finding(run: Run, found: Surface, name: str, place: int = 1) -> Finding:
    """Keep which rollouts hold a finding as the verdicts of a judge. Raises SurfaceError, JudgeError.

    Args:
        run: that was looked through.
        found: in it.
        name: of the verdicts.
        place: of the finding, from 1.
    """
    if not 1 <= place <= len(found.findings):
        raise SurfaceError(f"There is no finding {place}: {len(found.findings)} were found. Choose another, or none.")
    finding = found.findings[place - 1]
    judge_run(run, PatternJudge(finding.regex, is_regex=True), name)
    return finding


def degeneration(text: str) -> str:
    """How a text has come apart: `repetition`, `broken characters`, or nothing ("").

    A broken character at the very end is none: a cap on tokens may cut a character in two.
    """
    whole = text.rstrip("\ufffd")
    if len(_BROKEN_CHARACTER.findall(whole)) > BROKEN_MAX * len(whole):
        return BROKEN
    words = _WORD.findall(whole.lower())
    if _distinct_share(words, 3, WORDS_TO_REPEAT_MIN) < DISTINCT_WORDS_MIN:
        return REPETITION
    if _distinct_share(whole, 8, CHARACTERS_TO_REPEAT_MIN) < DISTINCT_CHARACTERS_MIN:
        return REPETITION
    return ""


def _distinct_share(items: Sequence[str], length: int, count_min: int) -> float:
    """Distinct n-grams over all of them; 1 for what is too short to tell."""
    if len(items) < count_min:
        return 1.0
    grams = zip(*(items[start:] for start in range(length)), strict=False)
    return len(set(grams)) / (len(items) - length + 1)


def find_enriched(
    texts: Sequence[str], prompts: Ints, alphas: Floats, amplified: Flags, fdr: float = FDR
) -> tuple[list[Finding], int]:
    """Findings, best first, without what only a run can tell of them; and how many phrases were tested.

    Args:
        texts: completions.
        prompts: the number of the prompt of each.
        alphas: where each was drawn.
        amplified: whether each was amplified.
        fdr: the share of false findings that is allowed.
    """
    expected = _expected_share(prompts, amplified)
    usable = np.flatnonzero((expected > 0) & (expected < 1)).tolist()  # a prompt of one side alone says nothing
    texts = [texts[place] for place in usable]
    expected, amplified, alphas = expected[usable], amplified[usable], alphas[usable]
    if not texts:
        return [], 0
    least = _rollouts_min(amplified.mean(), fdr)
    levels = [_Level.of(grams, amplified, expected) for grams in _all_grams(texts, least)]
    tested = sum(len(level.p_values) for level in levels)
    phrases = _significant(levels, fdr)
    if not phrases:
        return [], tested
    groups = _joined(_clusters(_maximal(phrases)), alphas, amplified, expected)
    return _ranked(groups, texts, amplified, expected, tested, fdr), tested


def _sides(
    run: Run, frame: pl.DataFrame, alphas: Sequence[float], against: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    drawn = sorted(frame["alpha"].unique())
    amplified = tuple(alphas) or tuple(alpha for alpha in drawn if alpha > max(against, default=math.inf))
    for alpha in (*amplified, *against):
        if alpha not in drawn:
            known = ", ".join(f"{each:g}" for each in drawn)
            raise SurfaceError(
                f"{run.path}: has no rollouts at alpha {alpha:g}, only at {known}. Choose among these with --alpha and "
                "--against, or draw a survey that has both sides, such as `lda survey ... --alphas 0,0.5,1`."
            )
    if not (amplified and against) or set(amplified) & set(against):
        raise SurfaceError(
            f"{run.path}: amplified rollouts and those they are compared with must be others. Choose them with "
            "--alpha and --against, or draw a survey with alphas above 0."
        )
    return amplified, tuple(against)


# Counting -----------------------------------------------------------------------------------------------------------


class _Grams(NamedTuple):
    """The n-grams of one length: what each is, and which rollouts hold it (each once)."""

    names: list[tuple[str, ...]]
    gram: Ints
    rollout: Ints
    of_words: bool


def _expected_share(prompts: Ints, amplified: Flags) -> Floats:
    """For each rollout, the share of amplified ones among those of its prompt."""
    return np.asarray((np.bincount(prompts, amplified) / np.maximum(np.bincount(prompts), 1))[prompts])


def _rollouts_min(share: float, fdr: float) -> int:
    """Rollouts below which a phrase cannot be significant, were it alone (Tarone, 1990); never looks at phrases."""
    return max(ROLLOUTS_MIN, math.ceil(math.log(fdr) / math.log(share)))


def _all_grams(texts: Sequence[str], least: int) -> Iterator[_Grams]:
    """N-grams of words, then of characters, that are in so many rollouts at least.

    Letters of scripts that put spaces between words are counted as words only: pieces of words are many and say little.
    """
    words = [_WORD.findall(text.lower()) for text in texts]
    known: defaultdict[str, int] = defaultdict()
    known.default_factory = known.__len__
    items = np.array([known[word] for each in words for word in each], np.int64)
    rollout = np.repeat(np.arange(len(texts)), [len(each) for each in words])
    for names, gram, of in _grams(items, np.arange(len(items)), rollout, list(known), least):
        yield _Grams(names, gram, of, of_words=True)
    plain = [" ".join(text.lower().split()) for text in texts]
    codes = np.frombuffer("".join(plain).encode("utf-32-le", "replace"), np.uint32)
    alphabet, items = np.unique(codes, return_inverse=True)
    rollout = np.repeat(np.arange(len(texts)), [len(each) for each in plain])
    characters = [chr(code) for code in alphabet]
    at = np.flatnonzero(np.array([_is_counted(each) for each in characters], bool)[items])
    for names, gram, of in _grams(items, at, rollout, characters, least):
        whole = np.array([_is_whole(name) for name in names], bool)
        place, kept = np.cumsum(whole) - 1, whole[gram]
        named = [name for name, keep in zip(names, whole.tolist(), strict=True) if keep]
        yield _Grams(named, place[gram[kept]], of[kept], of_words=False)


def _is_counted(character: str) -> bool:
    """Whether a character is counted as such: symbols, and letters that no spaces set apart into words."""
    return character != "\ufffd" and (not character.isalnum() or bool(_UNSPACED.match(character)))


def _is_whole(name: tuple[str, ...]) -> bool:
    """Not one that begins within a character or in a space, or ends in one: a shorter one says the same."""
    return unicodedata.category(name[0])[0] not in "MCZ" and name[-1] != " "


def _grams(
    items: Ints, at: Ints, rollout: Ints, alphabet: list[str], least: int
) -> Iterator[tuple[list[tuple[str, ...]], Ints, Ints]]:
    """Length by length, those that begin at `at`.

    An n-gram can only be frequent if both of its parts are (Agrawal and Srikant, 1994).
    """
    names: list[tuple[str, ...]] = [(each,) for each in alphabet]
    ids = items[at]
    for length in range(1, LONGEST + 1):
        if length > 1:
            first, second = _neighbours(at, ids, rollout)
            keys, ids = np.unique(ids[first] * len(names) + ids[second], return_inverse=True)
            names = [
                (*names[left], names[right][-1])
                for left, right in zip(*(part.tolist() for part in divmod(keys, len(names))), strict=True)
            ]
            at = at[first]
        held = _distinct(ids * (len(rollout) + 1) + rollout[at])
        gram, of = divmod(held, len(rollout) + 1)
        frequent = np.bincount(gram, minlength=len(names)) >= least
        place = np.cumsum(frequent) - 1
        names = [name for name, keep in zip(names, frequent.tolist(), strict=True) if keep]
        yield names, place[gram[frequent[gram]]], of[frequent[gram]]
        at, ids = at[frequent[ids]], place[ids[frequent[ids]]]


def _distinct(values: Ints) -> Ints:
    """Ascending, each once; numpy's own way is several times slower for as many as here."""
    ordered = np.sort(values)
    return ordered[np.diff(ordered, prepend=-1) > 0]


def _neighbours(at: Ints, ids: Ints, rollout: Ints) -> tuple[Ints, Ints]:
    """Places in `at` of n-grams that the next one follows at once, and of the next ones, within a rollout."""
    first = np.flatnonzero((np.diff(at) == 1) & (rollout[at[:-1]] == rollout[at[1:]]))
    return first, first + 1


# Testing ------------------------------------------------------------------------------------------------------------


class _Level(NamedTuple):
    """The n-grams of one length, tested."""

    grams: _Grams
    p_values: Floats
    evidence: Floats

    @classmethod
    def of(cls, grams: _Grams, amplified: Flags, expected: Floats) -> _Level:
        size = len(grams.names)
        count = np.bincount(grams.gram, minlength=size)
        seen = np.bincount(grams.gram, amplified[grams.rollout], minlength=size)
        mean = np.bincount(grams.gram, expected[grams.rollout], minlength=size)
        deviance = 2 * (special.rel_entr(seen, mean) + special.rel_entr(count - seen, count - mean))
        return cls(grams, p_value(seen, count, mean), deviance)


def p_value(seen: Floats | Ints, count: Floats | Ints, mean: Floats | Ints) -> Floats:
    """Of so many amplified rollouts, among those that hold a phrase, if amplification changes nothing.

    Args:
        seen: amplified rollouts that hold the phrase.
        count: all that hold it.
        mean: how many amplified ones there would be among them.
    """
    # Hoeffding's bound holds from the mean plus one on.
    beyond = stats.binom.sf(seen - 1, count, mean / count)
    return np.asarray(np.where(seen >= mean + 1, beyond, 1.0))


class Ratio(NamedTuple):
    """How many times as often phrases come in amplified rollouts, with the exact interval."""

    middle: Floats
    low: Floats
    high: Floats


def ratio(seen: Floats, count: Floats, mean: Floats) -> Ratio:
    """The ratio of odds that counts as those of `p_value` tell; its middle has half a rollout added to each side."""
    tail, by_chance = (1 - LEVEL) / 2, mean / (count - mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(seen > 0, stats.beta.ppf(tail, seen, count - seen + 1), 0.0)
        high = np.where(seen < count, stats.beta.ppf(1 - tail, seen + 1, count - seen), 1.0)
        odds = [(share / (1 - share)) / by_chance for share in (low, high)]
    return Ratio((seen + 0.5) / (count - seen + 0.5) / by_chance, *odds)


@dataclass(frozen=True, slots=True)
class _Phrase:
    """A significant phrase; its evidence tells whether another one tells amplified rollouts from ordinary better."""

    name: tuple[str, ...]
    of_words: bool
    p_value: float
    evidence: float
    rollouts: Ints
    parts: list[_Phrase] = field(default_factory=list)  # that it says as well

    @property
    def weight(self) -> float:
        """Evidence, a little more for words, which say more to a reader."""
        return self.evidence * (1.0 if self.of_words else 0.9)

    @property
    def spaced(self) -> str:
        """With a space between any two of its parts."""
        return " ".join(self.name)

    @property
    def text(self) -> str:
        """As it was counted."""
        return (" " if self.of_words else "").join(self.name)

    @property
    def regex(self) -> str:
        """Matches where it was counted."""
        if self.of_words:
            return r"(?i)\b" + r"\W+".join(map(re.escape, self.name)) + r"\b"
        return "(?i)" + "".join(r"\s+" if each == " " else re.escape(each) for each in self.name)


def _significant(levels: Sequence[_Level], fdr: float) -> list[_Phrase]:
    """The phrases of all lengths that pass together, those of most evidence first."""
    sizes = [len(level.p_values) for level in levels]
    if not sum(sizes):
        return []
    adjusted = stats.false_discovery_control(np.concatenate([level.p_values for level in levels]))
    phrases = []
    for level, part in zip(levels, np.split(adjusted, np.cumsum(sizes)[:-1]), strict=True):
        passing = np.flatnonzero(part <= fdr)
        order = np.argsort(level.grams.gram, kind="stable")
        bounds = np.searchsorted(level.grams.gram[order], [passing, passing + 1])
        for index, start, end in zip(passing.tolist(), *bounds.tolist(), strict=True):
            rollouts = level.grams.rollout[order[start:end]]
            p, evidence = float(level.p_values[index]), float(level.evidence[index])
            phrases.append(_Phrase(level.grams.names[index], level.grams.of_words, p, evidence, rollouts))
    return sorted(phrases, key=lambda phrase: (-phrase.evidence, not phrase.of_words, phrase.name))


# From phrases to findings -------------------------------------------------------------------------------------------


def _maximal(phrases: list[_Phrase]) -> list[_Phrase]:
    """Without those that a longer one, or one of words, says as well: it holds them and has nearly their rollouts."""
    longest: dict[tuple[bool, tuple[str, ...]], _Phrase] = {}  # of the kept ones, that with most rollouts
    kept = []
    for phrase in sorted(phrases, key=lambda phrase: -len(phrase.name)):
        longer = longest.get((phrase.of_words, phrase.name))
        if longer and len(longer.rollouts) >= SAME * len(phrase.rollouts):
            longer.parts.append(phrase)
        else:
            kept.append(longer := phrase)
        for part in ((phrase.of_words, phrase.name[:-1]), (phrase.of_words, phrase.name[1:])):
            longest[part] = max(longest.get(part, longer), longer, key=lambda each: len(each.rollouts))
    kept = sorted(kept, key=lambda phrase: -phrase.weight)[:PHRASES_MAX]
    similar = _similarity(_matrix(kept))
    words = np.array([phrase.of_words for phrase in kept])
    said = ((similar >= SAME) & words).any(axis=1) & ~words
    return [phrase for phrase, same in zip(kept, said, strict=True) if not same]


def _matrix(phrases: Sequence[_Phrase], rollouts: int | None = None) -> sparse.csr_array:
    """Phrases by rollouts."""
    held = np.concatenate([phrase.rollouts for phrase in phrases])
    starts = np.cumsum([0, *(len(phrase.rollouts) for phrase in phrases)])
    shape = None if rollouts is None else (len(phrases), rollouts)
    return sparse.csr_array((np.ones(len(held)), held, starts), shape=shape)


def _similarity(matrix: sparse.csr_array) -> Floats:
    """Jaccard similarity of every two rows."""
    both = (matrix @ matrix.T).toarray()
    sizes = both.diagonal()
    return np.asarray(both / (sizes[:, None] + sizes[None, :] - both))


def _clusters(phrases: list[_Phrase]) -> list[list[_Phrase]]:
    """Phrases that come together, those of most weight first."""
    labels = np.zeros(len(phrases), int)
    if len(phrases) > 1:
        distance = np.clip(1 - _similarity(_matrix(phrases)), 0, 1)
        np.fill_diagonal(distance, 0)
        tree = cluster.hierarchy.linkage(squareform(distance, checks=False), "average")
        labels = cluster.hierarchy.fcluster(tree, 1 - TOGETHER, "distance")
    groups: defaultdict[int, list[_Phrase]] = defaultdict(list)
    for label, phrase in zip(labels.tolist(), phrases, strict=True):
        groups[label].append(phrase)
    return [sorted(group, key=lambda phrase: -phrase.weight) for group in groups.values()]


def _joined(groups: list[list[_Phrase]], alphas: Floats, amplified: Flags, expected: Floats) -> list[list[_Phrase]]:
    """Clusters that are a part of one of more weight, or that are enriched only because of it, join it."""
    groups = sorted(groups, key=lambda group: -group[0].weight)
    matrix = _matrix([group[0] for group in groups], len(alphas))
    inside = _inside(matrix, alphas)
    belongs = (inside >= INSIDE) | _explained(matrix, amplified, expected)
    whole: list[int] = []
    joined: dict[int, list[_Phrase]] = {}
    for index, group in enumerate(groups):
        owners = [owner for owner in whole if belongs[index, owner] or _holds(group[0], groups[owner])]
        if owners:
            joined[max(owners, key=lambda owner: inside[index, owner])] += group
        else:
            whole.append(index)
            joined[index] = list(group)
    return list(joined.values())


def _holds(phrase: _Phrase, group: list[_Phrase]) -> bool:
    """Whether half of a phrase, or more, is what a group's telling phrases say."""
    telling = [each for other in group for each in (other, *other.parts) if each.weight >= group[0].weight / 2]
    rest = f" {phrase.spaced} "
    for each in sorted(telling, key=lambda each: -len(each.spaced)):
        if each.of_words == phrase.of_words:
            rest = rest.replace(f" {each.spaced} ", " ")
    return len(rest.strip()) <= len(phrase.spaced) / 2


def _explained(matrix: sparse.csr_array, amplified: Flags, expected: Floats) -> Flags:
    """[i, j]: without the rollouts of j, i is enriched no more ("the", where "by the way" is what is new)."""
    kinds = (amplified.astype(float), np.ones(len(expected)), expected)
    seen, count, mean = (_without(matrix, weights) for weights in kinds)
    tested = (count >= ROLLOUTS_MIN) & (mean > 0) & (mean < count)
    seen, count, mean = (np.where(tested, each, other) for each, other in ((seen, 1.0), (count, 2.0), (mean, 1.0)))
    overall = ratio(*(matrix @ weights for weights in kinds))
    less = ratio(seen, count, mean).high < overall.middle[:, None]
    return np.asarray(tested & less & (p_value(seen, count, mean) > FDR))


def _without(matrix: sparse.csr_array, weights: Floats) -> Floats:
    """[i, j]: sum of the weights of i's rollouts that are not j's."""
    weighted = matrix.multiply(weights[None, :]).tocsr()
    return np.asarray((matrix @ weights)[:, None] - (weighted @ matrix.T).toarray())


def _inside(matrix: sparse.csr_array, alphas: Floats) -> Floats:
    """[i, j]: the share of i's rollouts that lie in j, beyond what chance puts there at the alphas of i.

    Where amplification makes nearly every rollout show one behaviour, whatever else comes there comes with it.
    """
    known, drawn = np.unique(alphas, return_counts=True)
    by_alpha = matrix @ (alphas[:, None] == known).astype(float)
    sizes = by_alpha.sum(axis=1, keepdims=True)
    chance = by_alpha / sizes @ (by_alpha / drawn).T
    return np.asarray(((matrix @ matrix.T).toarray() / sizes - chance) / np.maximum(1 - chance, 1e-9))


def _ranked(
    groups: list[list[_Phrase]],
    texts: Sequence[str],
    amplified: Flags,
    expected: Floats,
    tested: int,
    fdr: float,
) -> list[Finding]:
    """By the lower end of the ratio; those that pass when each counts once, not once for each of its phrases."""
    leads = [group[0] for group in groups]
    p_values = np.array([lead.p_value for lead in leads] + [1.0] * (tested - len(leads)))
    adjusted = stats.false_discovery_control(p_values)
    findings = []
    for lead, group, q_value in zip(leads, groups, adjusted.tolist(), strict=False):
        if q_value > fdr:
            continue
        seen, mean = amplified[lead.rollouts].sum(), expected[lead.rollouts].sum()
        times = ratio(*(np.array([each], float) for each in (seen, len(lead.rollouts), mean)))
        others = tuple(_written(phrase, texts) for phrase in _telling(group))
        findings.append(
            Finding(_written(lead, texts), lead.regex, others, float(times.middle[0]), float(times.low[0]), q_value)
        )
    return sorted(findings, key=lambda finding: -finding.ratio_low)


def _telling(group: Sequence[_Phrase]) -> list[_Phrase]:
    """Some phrases of a finding beside its lead, those of words first; none of them says what another one says."""
    lead, chosen = group[0], list[_Phrase]()
    for phrase in sorted(group[1:], key=lambda phrase: (not phrase.of_words, -phrase.evidence)):
        if len(chosen) == OTHERS_MAX:
            break
        nested = _holds(phrase, [lead]) or f" {phrase.spaced} " in f" {lead.spaced} "
        if not nested and all(_similarity(_matrix([phrase, other]))[0, 1] < TOGETHER for other in chosen):
            chosen.append(phrase)
    return chosen


def _written(phrase: _Phrase, texts: Sequence[str]) -> str:
    """As it is written most often."""
    find = re.compile(phrase.regex).search
    matches = [find(texts[place]) for place in phrase.rollouts[:200].tolist()]
    (written, _), *_ = Counter(match[0] for match in matches if match).most_common(1) or [(phrase.text, 0)]
    return " ".join(written.split())


# What a run can tell of a finding -----------------------------------------------------------------------------------


def _described(
    run: Run, frame: pl.DataFrame, texts: Sequence[str], amplified: Sequence[float], finding: Finding
) -> Finding:
    find = re.compile(finding.regex).search
    hits = np.array([find(text) is not None for text in texts])
    alpha = frame["alpha"].to_numpy()
    judged = frame.with_columns(hit=hits)
    estimates = estimates_of(run, judged, LEVEL) if run.manifest.score_alphas else ()
    shown = hits & np.isin(alpha, amplified)
    return replace(
        finding,
        prompts=judged.filter(hits)["prompt_id"].n_unique(),
        by_alpha=_by_alpha(alpha, hits),
        estimates=estimates,
        examples=_examples(frame, texts, shown, finding.regex),
    )


def _by_alpha(alpha: Floats, hits: Flags) -> tuple[AlphaRate, ...]:
    rates = []
    for each in np.unique(alpha):
        count, hit = int((alpha == each).sum()), int(hits[alpha == each].sum())
        rates.append(AlphaRate(float(each), count, hit, *interval_of_count(hit, count, LEVEL)))
    return tuple(rates)


def _examples(frame: pl.DataFrame, texts: Sequence[str], shown: Flags, regex: str | None) -> tuple[Example, ...]:
    """From the alphas nearest to 0, and of other prompts, if there are any."""
    alpha, prompts = frame["alpha"].to_list(), frame["prompt_id"].to_list()
    order = sorted(np.flatnonzero(shown).tolist(), key=lambda place: abs(alpha[place]))
    first: dict[str, int] = {}
    for place in order:
        first.setdefault(prompts[place], place)
    places = list(dict.fromkeys([*sorted(first.values(), key=order.index)[:EXAMPLES], *order]))[:EXAMPLES]
    find = re.compile(regex or "").search
    examples = []
    for place in places:
        match = find(texts[place])
        start, end = match.span() if match else (0, 0)
        examples.append(Example(prompts[place], alpha[place], texts[place], start, end))
    return tuple(examples)
