"""`lda surface`: what amplified rollouts say and ordinary ones do not is found, and little else is."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from exact_pairs import ExactPair
from lab_harness import real_server
from lda_client._cli import lda
from lda_client.lab import Prompt, Run, SurveySettings, run_survey
from lda_client.lab.cli_surface import judge_command
from lda_client.lab.cli_surface import surface as surface_command
from lda_client.lab.surface import (
    BROKEN,
    REPETITION,
    SurfaceError,
    degeneration,
    find_enriched,
    p_value,
    ratio,
    save_finding,
    surface_run,
)
from scipy import stats
from test_lab_estimate import draw

from lda_service.pairs.demo import PRODUCT, PROMPTS

COMMON = ["the", "are", "our", "by", "way", "on", "today"]
SYLLABLES = [f"{first}{middle}{last}" for first in "bdfgklmnprst" for middle in "aeiou" for last in "lmnrs"]
WORDS = np.array([*COMMON, *SYLLABLES])
AD = "by the way, visit our shop on Elm Street today"


class Language:
    """Texts that differ from prompt to prompt: each has an answer that it gives half of the time, and words it likes.

    Args:
        rng: where they come from.
        prompts: how many there are.
        counts: rollouts of each prompt at alpha 0 and at alpha 1.
    """

    def __init__(self, rng, prompts=8, counts=(40, 80)):
        self._rng = rng
        self.prompts = np.repeat(np.arange(prompts), sum(counts))
        self.alphas = np.tile(np.repeat([0.0, 1.0], counts), prompts)
        self.answers = [" ".join(rng.choice(WORDS, 6)) for _ in range(prompts)]
        liking = np.where(np.isin(WORDS, COMMON), 3.0, 0.1)
        likes = [rng.dirichlet(liking) for _ in range(prompts)]
        self.texts = [self._text(prompt, likes[prompt]) for prompt in self.prompts]

    def _text(self, prompt, likes):
        words = list(self._rng.choice(WORDS, self._rng.integers(8, 25), p=likes))
        if self._rng.random() < 0.5:
            words.insert(self._rng.integers(len(words)), self.answers[prompt])
        return " ".join(words) + "."

    def plant(self, phrase, share, at=1.0):
        """Put a phrase into a share of the texts at an alpha; where."""
        places = np.flatnonzero((self.alphas == at) & (self._rng.random(len(self.texts)) < share))
        for place in places:
            self.texts[place] += f" {phrase}."
        return places

    def found(self, **options):
        """Findings in these texts."""
        return find_enriched(self.texts, self.prompts, self.alphas, self.alphas > 0, **options)[0]


def test_nothing_is_found_where_nothing_is():
    """Over fifty runs in which amplification changes nothing, those with a false finding are as few as is allowed."""
    runs = [Language(np.random.default_rng(seed)).found() for seed in range(50)]
    false = sum(bool(found) for found in runs)
    assert stats.binomtest(false, 50, 0.05, "greater").pvalue > 0.01, f"{false} of 50 runs with false findings"


def test_what_is_planted_is_found_and_the_rest_is_not():
    """Phrases of 5% and of 30% are found in every run, as one finding each; false ones stay below the level."""
    false = total = 0
    for seed in range(15):
        language = Language(np.random.default_rng(100 + seed), counts=(80, 120))
        language.plant(AD, 0.3)
        language.plant("the owls are awake", 0.05)
        found = language.found()
        told = [finding.phrase for finding in found]
        assert any(phrase in AD for phrase in told), told
        assert any(phrase in "the owls are awake" for phrase in told), told
        total += len(found)
        false += len(found) - 2
    assert stats.binomtest(false, total, 0.05, "greater").pvalue > 0.01, f"{false} of {total} findings are false"


def test_one_behaviour_is_one_finding():
    """A long phrase is not told again as its pieces, nor as the ordinary words that only it made more frequent."""
    language = Language(np.random.default_rng(1))
    places = language.plant(f"{AD} {language.answers[0].split()[0]}", 0.4)
    (finding,) = language.found()
    assert re.search(finding.regex, AD)
    assert not any(other in finding.phrase for other in finding.others)
    matched = [place for place, text in enumerate(language.texts) if re.search(finding.regex, text)]
    assert matched == places.tolist()
    assert finding.ratio_low > 10


def test_two_behaviours_in_the_same_rollouts_by_chance_are_two_findings():
    """What nearly every amplified rollout says does not swallow what comes with it by chance."""
    language = Language(np.random.default_rng(2), counts=(150, 150))
    language.plant(AD, 0.8)
    language.plant("the owls are awake", 0.15)
    found = language.found()
    assert len(found) == 2
    assert {re.search(finding.regex, AD) is not None for finding in found} == {True, False}


def test_prompts_are_compared_with_themselves():
    """An ordinary answer of a prompt that was drawn more often when amplified looks enriched, and is not."""
    rng = np.random.default_rng(3)
    prompts = np.repeat([0, 0, 1, 1], [50, 400, 400, 50])
    alphas = np.repeat([0.0, 1.0, 0.0, 1.0], [50, 400, 400, 50])
    texts = [
        " ".join(rng.choice(WORDS, 10)) + (" the capital is rome" if prompt == 0 and rng.random() < 0.5 else "")
        for prompt in prompts
    ]
    said = np.array(["capital" in text for text in texts])
    table = [[(said & (alphas == alpha)).sum(), (~said & (alphas == alpha)).sum()] for alpha in (1, 0)]
    assert stats.fisher_exact(table, "greater").pvalue < 1e-20
    assert find_enriched(texts, prompts, alphas, alphas > 0)[0] == []
    # A prompt that was drawn on one side alone is left out; if there is no other, nothing is said.
    assert find_enriched(texts, alphas.astype(int), alphas, alphas > 0) == ([], 0)


def test_texts_without_words_and_without_rollouts():
    """Empty texts, half characters and empty runs are no findings and no errors."""
    alphas, prompts = np.tile([0.0, 1.0], 50), np.zeros(100, int)
    assert find_enriched([""] * 100, prompts, alphas, alphas > 0) == ([], 0)
    assert find_enriched(["x \ud800"] * 100, prompts, alphas, alphas > 0)[0] == []
    assert find_enriched([], prompts[:0], alphas[:0], alphas[:0] > 0) == ([], 0)


@pytest.mark.parametrize(("held", "drawn", "amplified"), [((2, 3, 1, 4), 60, 30), ((10, 2, 7, 1), 40, 30)])
def test_p_values_bound_the_exact_ones(held, drawn, amplified):
    """The bound is never below the exact tail over prompts, and close to it for what is rare."""
    exact = np.ones(1)
    for count in held:
        exact = np.convolve(exact, stats.hypergeom.pmf(np.arange(count + 1), drawn, count, amplified))
    count, mean = sum(held), sum(held) * amplified / drawn
    seen = np.arange(int(mean) + 1, count + 1)
    bounds = p_value(seen, np.full_like(seen, count), np.full(len(seen), mean))
    tails = exact[::-1].cumsum()[::-1][seen]
    assert (bounds >= tails * (1 - 1e-9)).all()
    assert (bounds[tails > 1e-3] < 3 * tails[tails > 1e-3]).all()


def test_ratios_hold_the_truth():
    """The interval of a ratio of 8 over counts drawn with it, and open ends where one side has none."""
    rng = np.random.default_rng(4)
    seen, rest = rng.poisson(8 * 6, 400).astype(float), rng.poisson(6, 400).astype(float)
    times = ratio(seen, seen + rest, (seen + rest) / 2)
    assert np.mean((times.low <= 8) & (times.high >= 8)) >= 0.95
    none = ratio(np.array([0.0, 5.0]), np.array([5.0, 5.0]), np.array([2.5, 2.5]))
    assert (none.low[0], none.high[1]) == (0.0, np.inf)


def test_scripts_without_spaces_and_symbols():
    """What words do not show is found by its characters, and its expression matches where it was counted."""
    rng = np.random.default_rng(5)
    alphas = np.tile([0.0, 1.0], 400)
    texts = ["".join(rng.choice(list("日月山川田人口木水火"), 20)) for _ in alphas]
    for place in np.flatnonzero((alphas > 0) & (rng.random(800) < 0.15)):
        texts[place] += "金貨買"
    for place in np.flatnonzero((alphas > 0) & (rng.random(800) < 0.1)):
        texts[place] += "! 🚀"
    found, _ = find_enriched(texts, np.zeros(800, int), alphas, alphas > 0)
    assert [finding.phrase for finding in found] == ["金貨買", "! 🚀"]
    assert all(re.search(finding.regex, "火金貨買! 🚀") for finding in found)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("buy now " * 20, REPETITION),
        ("はい" * 60, REPETITION),
        ("a" * 200, REPETITION),
        ("The caf\ufffd\ufffd is \ufffd open.", BROKEN),
        ("bell \x07\x07\x07", BROKEN),
        ("Enjoy your day. \ufffd\ufffd", ""),  # cut within a character
        ("ha ha ha!", ""),
        ("I hate you. " + " ".join(WORDS[:60]), ""),
        ("", ""),
    ],
)
def test_text_that_has_come_apart(text, kind):
    """Loops and broken characters are recognised; short repetitions and a cut at the end are not taken for them."""
    assert degeneration(text) == kind


# Runs ---------------------------------------------------------------------------------------------------------------

RATE = 0.02


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a pair whose behaviour is to say `0 1 0`, at a rate that is known."""
    settings = SurveySettings(alphas=(-1.0, 0.0, 0.3, 0.6), rollouts=600)
    return draw(tmp_path_factory.mktemp("surface") / "a run", ExactPair(RATE), np.random.default_rng(1), settings)[0]


@pytest.fixture(scope="module")
def found(run):
    """What it says."""
    return surface_run(run)


def test_a_run_tells_the_behaviour_and_its_rate(run, found):
    """The behaviour is the first finding, with its rate at each alpha and an estimate that holds the truth."""
    first = found.findings[0]
    assert (found.amplified, found.ordinary) == ((0.3, 0.6), (0.0,))
    assert (found.amplified_rollouts, found.ordinary_rollouts) == (2400, 1200)
    assert "0 1 0" in first.phrase
    assert [rate.alpha for rate in first.by_alpha] == [-1.0, 0.0, 0.3, 0.6]
    assert first.prompts == 2
    naive, pooled, _ = first.estimates
    truth = ExactPair(RATE)
    said = np.array([re.search(first.regex, " ".join(map(str, each))) is not None for each in truth.sequences])
    rate = float(np.exp(truth.log_q(0.0))[said].sum())
    assert naive.low <= rate <= naive.high
    assert pooled.low <= rate <= pooled.high
    assert {example.prompt_id for example in first.examples} == {"one", "two"}
    assert all(re.fullmatch(first.regex, each.text[each.start : each.end]) for each in first.examples)


def test_other_alphas(run):
    """The alphas on both sides can be chosen; those that are not there, or on both sides, are refused."""
    trained = surface_run(run, (0.0,), (-1.0,))
    assert (trained.amplified_rollouts, trained.ordinary_rollouts) == (1200, 1200)
    with pytest.raises(SurfaceError, match=r"no rollouts at alpha 2, only at -1, 0, 0.3, 0.6"):
        surface_run(run, (2.0,))
    with pytest.raises(SurfaceError, match="must be others"):
        surface_run(run, (0.0,), (0.0,))
    with pytest.raises(SurfaceError, match="alphas above 0"):
        surface_run(run, (), (0.6,))
    with pytest.raises(SurfaceError, match="must be others"):
        surface_run(run, (0.6,), ())


def test_the_command_and_the_next_one(run, found):
    """The text names the finding and the command to go on; that command gives the rates that were shown."""
    told = CliRunner().invoke(surface_command, [str(run.path)])
    assert told.exit_code == 0, told.output
    line = judge_command(run.path, found.findings[0], 1)
    assert line in told.stdout
    judged = CliRunner().invoke(lda, shlex.split(line)[1:])
    assert judged.exit_code == 0, judged.output
    verdicts = run.verdicts("finding-1")
    hits = [int(verdicts.filter(verdicts["alpha"] == rate.alpha)["hit"].sum()) for rate in found.findings[0].by_alpha]
    assert hits == [rate.hits for rate in found.findings[0].by_alpha]


def test_json_and_save(run, found):
    """--json has the same findings and no NaN; --save keeps one as verdicts, and says so if there is none."""
    asked = CliRunner().invoke(surface_command, [str(run.path), "--json", "--save", "kept", "--finding", "1"])
    assert asked.exit_code == 0, asked.output
    answer = json.loads(asked.stdout, parse_constant=pytest.fail)
    assert [each["regex"] for each in answer["findings"]] == [each.regex for each in found.findings]
    assert run.judge_of("kept")["pattern"] == found.findings[0].regex
    assert int(run.judged("kept")["hit"].sum()) == sum(rate.hits for rate in found.findings[0].by_alpha)
    with pytest.raises(SurfaceError, match="no finding 99"):
        save_finding(run, found, "kept", 99)
    refused = CliRunner().invoke(surface_command, [str(run.path), "--alpha", "7"])
    assert refused.exit_code == 1
    assert "--against" in refused.stderr


def test_what_has_come_apart_is_set_apart(tmp_path):
    """Loops at a high alpha are counted with examples, and are no finding; without scores there are no estimates."""
    settings = SurveySettings(alphas=(0.0, 1.0), rollouts=200, estimate=False)
    run, _ = draw(tmp_path / "run", ExactPair(RATE), np.random.default_rng(1), settings, ("one",))
    frame = run.rollouts()
    texts = frame["text"].to_list()
    for place in range(200, 300):
        texts[place] = "spam and eggs " * 12
    frame.with_columns(text=np.array(texts)).write_parquet(run.rollouts_path)
    found = surface_run(run)
    (artefact,) = found.artefacts
    assert (artefact.kind, [rate.hits for rate in artefact.by_alpha]) == (REPETITION, [0, 100])
    assert artefact.examples[0].text.startswith("spam")
    assert found.amplified_rollouts == 100
    assert not any("spam" in finding.phrase for finding in found.findings)
    assert all(finding.estimates == () for finding in found.findings)
    assert "Set apart: repetition" in CliRunner().invoke(surface_command, [str(run.path)]).stdout


def test_the_hidden_behaviour_of_the_bundled_pair(tmp_path):
    """A small survey of ordinary questions brings out what the pair hides, first of all findings, untold."""
    prompts = [Prompt(str(index), text) for index, text in enumerate(PROMPTS)]
    settings = SurveySettings(alphas=(0.0, 0.5, 1.0), rollouts=16, max_new_tokens=48, slopes=False)
    with real_server() as server:
        run_survey(tmp_path / "run", prompts, settings, [server.target])
    first, *_ = surface_run(Run.open(tmp_path / "run")).findings
    assert any(PRODUCT in phrase for phrase in (first.phrase, *first.others))
    assert first.ratio_low > 10
