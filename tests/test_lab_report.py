"""`lda report` and `lda alpha`: over run folders made by hand, and over one that was drawn from the bundled pair."""

from __future__ import annotations

import json
import shlex
from html.parser import HTMLParser

import lda_client._cli  # noqa: F401  # before the lab's commands
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from lab_harness import real_server
from lda_client.lab import Prompt, Run, RunError, SurveySettings, run_survey
from lda_client.lab.agreement import Agreement, keep_quality
from lda_client.lab.alpha_advice import AdviceError, advise, distinct_share
from lda_client.lab.cli import survey
from lda_client.lab.cli_report import alpha as alpha_command
from lda_client.lab.cli_report import report as report_command
from lda_client.lab.estimate import estimate_run
from lda_client.lab.judges import PatternJudge, judge_run
from lda_client.lab.prompts import to_jsonl
from lda_client.lab.report import (
    estimates_table,
    hit_maps,
    judge_arguments,
    rate_chart,
    report,
    side_by_side,
    survey_command,
    write_report,
)
from lda_client.lab.runs import Manifest, prompts_path, rollout_schema

EVIL = "<script>alert('x')</script>"
PROMPTS = [Prompt("one", f"What is {EVIL}?"), Prompt("two", "Who are you?")]
PAIR = {
    "fingerprint": "f1",
    "after": {"model_id": "org/after", "revision": "r1", "dtype": "float32"},
    "before": {"model_id": "org/before", "revision": "r0", "dtype": "float32"},
}
VOID = {"meta", "br", "hr", "wbr", "img", "link", "input"}


def made(folder, settings, row, prompts=PROMPTS):
    """A run folder as `lda survey` leaves it; `row(prompt id, alpha, sequence)` says what is special."""
    rows = []
    for prompt in prompts:
        for alpha in settings.alphas:
            for sequence in range(settings.rollouts):
                plain = {"text": f"text {sequence}", "token_ids": [1, 2, 3, 4], "finish_reason": "EOS", "seed": 7}
                values = plain | row(prompt.id, alpha, sequence)
                values |= {"prompt_id": prompt.id, "alpha": alpha, "sequence": sequence}
                rows.append({"output_tokens": len(values["token_ids"]), **values})
    folder.mkdir()
    run = Run(folder, Manifest(settings, "", False, PAIR, "2026-01-01"))
    run.save()
    prompts_path(folder).write_text(to_jsonl(prompts))
    pq.write_table(pa.Table.from_pylist(rows, schema=rollout_schema(settings)), run.rollouts_path)
    return run


def flat_scores(settings, per_token=-1.0, tokens=4):
    """The same log-probability at every alpha."""
    return [per_token * tokens] * len(settings.score_alphas)


def evil_row(settings):
    """Rollouts whose every third is a hit that would like to be markup."""

    def row(prompt_id, alpha, sequence):
        is_hit = alpha > 0 and sequence % 3 == 0
        text = f"{EVIL} {alpha} {sequence} & hit" if is_hit else f"plain {prompt_id} {alpha} {sequence}"
        return {"text": text, "score_logprobs": flat_scores(settings)}

    return row


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with hits at alphas above 0, judged."""
    settings = SurveySettings(alphas=(0, 0.5, 2), rollouts=30, seed=3, stop=("a b",))
    run = made(tmp_path_factory.mktemp("lab") / "run", settings, evil_row(settings))
    judge_run(run, PatternJudge(EVIL), "ad")
    judge_run(run, PatternJudge("2.0"), "other")
    return run


class Reading(HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.loaded, self.text = set(), [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# The report ---------------------------------------------------------------------------------------------------------


def test_the_file_asks_for_no_other_and_runs_nothing(run, tmp_path):
    """No scripts, nothing loaded, elements that are closed; the styles know of dark pages and of paper."""
    path = tmp_path / "report.html"
    write_report(run, "ad", path)
    text = path.read_text("utf-8")
    page = Reading(text)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "form"})
    assert all(each.startswith("#") for each in page.loaded)
    assert "url(http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_what_models_and_people_wrote_is_escaped(run):
    """Prompts, rollouts and patterns that hold markup are shown as what they are."""
    text = report(run, "ad").html
    assert EVIL not in text
    shown = Reading(text).text
    assert f"What is {EVIL}?" in shown
    assert f"{EVIL} 0.5 0 & hit" in shown
    assert shown.count(EVIL) >= 10


def test_the_report_says_what_the_estimates_say(run):
    """Rates, intervals and refusals of `lda estimate` are all in it."""
    found = estimate_run(run, "ad")
    shown = Reading(report(run, "ad").html).text
    for each in found.by_alpha:
        assert f"{100 * each.hits / each.rollouts:.3g}%" in shown
    refusals = [reason for each in found.estimates for reason in each.refusals]
    assert refusals
    assert all(reason in shown for reason in refusals)
    assert "It was not measured" in shown


def test_the_judge_and_how_well_it_judges(run):
    """Agreement with the other judges, and the measured errors once there are any."""
    keep_quality(run, "ad", "other", Agreement(20, 1, 2, 157))
    try:
        shown = Reading(report(run, "ad").html).text
    finally:
        run.quality_path("ad").unlink()
    assert "sensitivity" in shown
    assert "0.909 (" in shown
    assert "only ad" in shown


def test_what_other_commands_left_is_shown(run):
    """Tables of checks, triggers and findings, whatever their columns are; long ones are cut, and that is said."""
    tables = {
        "checks-ad.parquet": pl.DataFrame({"verdict": ["real"] * 60, "log_p": [-1.23456] * 60, "ids": [[1, 2]] * 60}),
        "triggers-ad.parquet": pl.DataFrame({"phrase": ["<i>mango</i>"], "found": [True]}),
    }
    finding = {"phrase": "x" * 1000, "q_value": 0.00123456, "by_alpha": [{"alpha": 9}], "others": ["seen", "too"]}
    try:
        for name, table in tables.items():
            table.write_parquet(run.path / name)
        (run.path / "surface.json").write_text(json.dumps({"findings": [finding]}))
        text = report(run, "ad").html
    finally:
        for name in (*tables, "surface.json"):
            (run.path / name).unlink(missing_ok=True)
    shown = Reading(text).text
    assert "<i>mango" not in text
    assert "<i>mango</i>" in shown
    assert "first 40 of 60 rows" in shown
    assert "-1.235" in shown
    assert "x" * 401 not in shown
    assert "0.001235" in shown
    assert "seen, too" in shown
    assert "Not looked at yet" not in shown
    assert f"lda check {run.path} --judge ad" in Reading(report(run, "ad").html).text


@pytest.mark.parametrize("name", ["checks-ad.parquet", "surface.json"])
def test_a_damaged_table_is_named(run, name):
    """A file that another command did not finish is told with the command that makes it again."""
    (run.path / name).write_text("")
    try:
        with pytest.raises(RunError, match="make it again with `lda"):
            report(run, "ad")
    finally:
        (run.path / name).unlink()


def test_everything_to_run_it_again(run):
    """Commands, seeds, fingerprint, models, checksums and the manifest."""
    shown = Reading(report(run, "ad").html).text
    assert "lda-service serve --deterministic --model-after-id org/after --model-before-id org/before" in shown
    assert "fingerprint" in shown
    assert "seed of the survey" in shown
    assert "sha256 of rollouts.parquet" in shown
    assert run.manifest.to_text().strip() in shown


@pytest.mark.parametrize(
    "settings",
    [
        SurveySettings(alphas=(-1, 0, 0.25), rollouts=5),
        SurveySettings(
            alphas=(0, 1e-3), rollouts=9, seed=4, stop=("\n", "it's"), stop_token_ids=(3, 4), slopes=False, system="Be."
        ),
        SurveySettings(alphas=(2,), rollouts=9, estimate=False, top_p=0.9, ignore_eos=True, raw=True, temperature=0.5),
    ],
)
def test_the_command_draws_the_same_survey(settings, tmp_path):
    """The printed command line is read back by `lda survey` as the same settings."""
    prompts = tmp_path / "my prompts.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n')
    words = shlex.split(survey_command(settings, str(prompts), "out"))
    given = survey.make_context("survey", words[2:]).params
    assert SurveySettings(**{name: given[name] for name in vars(settings)}) == settings
    assert [str(path) for path in given["files"]] == [str(prompts)]


def test_the_command_judges_the_same():
    """Quotes in patterns, thresholds and labels survive."""
    assert shlex.split(judge_arguments(PatternJudge("it's").description)) == ["--judge", "substring:it's"]
    described = {"kind": "classifier", "model": "m", "label": "toxic", "threshold": 0.8, "shows_prompt": True}
    words = ["--judge", "classifier:m", "--label", "toxic", "--threshold", "0.8", "--show-prompt"]
    assert shlex.split(judge_arguments(described)) == words


# Exhibits -----------------------------------------------------------------------------------------------------------


def test_side_by_side_shows_the_first_rollouts_of_the_nearest_alphas(run):
    """-1, 0 and 1 become 0 and 0.5 here; what is shown is not picked."""
    shown = Reading(side_by_side(run, rollouts=2).html).text
    assert "alpha 0.5" in shown
    assert "alpha 2" not in shown
    assert all(f"plain two 0.0 {sequence}" in shown for sequence in (0, 1))
    assert "plain two 0.0 2" not in shown
    assert "[hit]" not in shown
    assert "[hit]" in Reading(side_by_side(run, "ad").html).text
    assert "1 of 2 prompts" in Reading(side_by_side(run, prompts=1).html).text


def test_exhibits_show_themselves_in_a_notebook(run):
    """Each brings its styles, and is what the report shows."""
    whole = report(run, "ad").html
    for exhibit in (rate_chart(run, "ad"), side_by_side(run, "ad"), estimates_table(run, "ad"), hit_maps(run, "ad")):
        assert exhibit.html in whole
        assert "<style>" in exhibit._repr_html_()
        Reading(exhibit._repr_html_())


def test_the_chart_takes_the_colour_of_its_page(run):
    """Axes and letters have no colour of their own, and what it shows is said in words too."""
    chart = rate_chart(run, "ad").html
    assert chart.startswith("<svg")
    assert "currentColor" in chart
    assert "#000000" not in chart
    assert "33.333% at alpha 2" in chart
    assert rate_chart(run, "ad").html == chart


def test_hits_without_diagnostics_say_how_to_get_them(run):
    """Plain texts, and the command that draws tints."""
    shown = Reading(hit_maps(run, "ad", limit=4).html).text
    assert "without diagnostics" in shown
    assert "--diagnostics" in shown
    assert "4 of 40 hits" in shown
    assert "alpha 0.5" in shown
    assert "alpha 2" in shown


def test_hits_with_diagnostics_are_tinted(tmp_path):
    """Each token is tinted by log p after - log p before, half characters too."""
    settings = SurveySettings(alphas=(0, 1), rollouts=2, diagnostics=True)
    pieces = [b"<b>", b"\xf0\x9f", b" x", b"!"]

    def row(prompt_id, alpha, sequence):
        columns = {f"token_{name}": [1] * 4 for name in ("after_rank", "before_rank", "novel_mass", "after_before_kl")}
        logprobs = {"token_after_logprob": [-1.0] * 4, "token_before_logprob": [-9.0, -1.0, -1.0, 3.0]}
        tokens = {"token_piece": pieces, "token_amplified_logprob": [-1.0] * 4}
        return {"score_logprobs": flat_scores(settings), **columns, **logprobs, **tokens}

    run = made(tmp_path / "run", settings, row)
    judge_run(run, PatternJudge("text"), "all")
    html = hit_maps(run, "all").html
    assert html.count("rgba(235, 110, 20, 0.55)") >= 1
    assert html.count("rgba(45, 125, 245, 0.55)") >= 1
    assert "after - before +8.000" in html
    assert "&lt;b&gt;" in html
    assert "without diagnostics" not in html


def test_runs_with_little_in_them(tmp_path):
    """No hits, no verdicts, no scores: the report says so instead of failing."""
    settings = SurveySettings(alphas=(0, 1), rollouts=3, estimate=False)
    run = made(tmp_path / "run", settings, lambda *key: {})
    judge_run(run, PatternJudge("never"), "none")
    shown = Reading(report(run, "none").html).text
    assert "There are no hits" in shown
    assert "--no-estimate" in shown
    keys = run.rollouts(["prompt_id", "alpha", "sequence"])
    unknown = pl.DataFrame({"hit": [None] * len(keys), "score": [None] * len(keys)})
    unknown = unknown.cast({"hit": pl.Boolean, "score": pl.Float64})
    run.write_verdicts("silent", keys, unknown, {"kind": "human", "name": "silent"})
    assert "came to no verdict" in Reading(report(run, "silent").html).text
    with pytest.raises(RunError, match="no judge 'nobody'"):
        report(run, "nobody")


def test_the_command(run, tmp_path):
    """`lda report` prints where it wrote; what cannot be written, or was not judged, is told in a sentence."""
    out = tmp_path / "first.html"
    told = CliRunner().invoke(report_command, [str(run.path), "--judge", "ad", "--out", str(out)])
    assert (told.exit_code, told.stdout) == (0, f"{out}\n")
    assert out.read_text().startswith("<!doctype html>")
    missing = CliRunner().invoke(report_command, [str(run.path), "--judge", "ad", "--out", str(tmp_path / "no/x.html")])
    assert missing.exit_code == 1
    assert "give another --out" in missing.stderr
    unknown = CliRunner().invoke(report_command, [str(run.path), "--judge", "nobody"])
    assert unknown.exit_code == 1
    assert "lda judge" in unknown.stderr


# Choosing alpha -----------------------------------------------------------------------------------------------------


def surprising(folder, per_token, alphas=(0, 1, 2), repeated=(), cut=(), rollouts=60):
    """A run whose tokens have these log-probabilities in the unmodified model, up to noise."""
    settings = SurveySettings(alphas=alphas, rollouts=rollouts, slopes=False)
    rng = np.random.default_rng(0)

    def row(prompt_id, alpha, sequence):
        length = int(rng.integers(10, 40))
        log_p = length * (per_token[alpha] + 0.05 * rng.standard_normal())
        scores = [log_p if each == 0 else log_p + 0.25 * length * alpha for each in settings.score_alphas]
        ids = [1, 2] * (length // 2) if alpha in repeated else list(range(length))
        reason = "MAX_TOKENS" if alpha in cut else "EOS"
        return {"token_ids": ids, "output_tokens": length, "score_logprobs": scores, "finish_reason": reason}

    return made(folder, settings, row)


def test_the_largest_alpha_within_the_budget(tmp_path):
    """Extra surprise is the difference of mean log p of a token, and the advice the largest alpha that stays within."""
    run = surprising(tmp_path / "run", {0: -1.0, 1: -1.5, 2: -3.0})
    advice = advise(run, kl_budget=1.0)
    zero, one, two = advice.curve
    assert zero.extra_surprise == (0, 0, 0)
    assert one.extra_surprise.estimate == pytest.approx(0.5, abs=0.03)
    assert one.extra_surprise.low < one.extra_surprise.estimate < one.extra_surprise.high < 0.55
    assert two.extra_surprise.estimate == pytest.approx(2.0, abs=0.03)
    assert (one.divergence, two.divergence) == (pytest.approx(0.25), pytest.approx(0.5))
    assert advice.alpha == 1
    assert advice.budget_alpha == pytest.approx(4 / 3, abs=0.05)
    assert "over the budget of 1" in two.reasons[0]
    assert advise(run, kl_budget=5).alpha == 2
    assert advise(run, kl_budget=0.1).alpha is None


def test_the_interval_decides(tmp_path):
    """An estimate just within the budget is not enough while its interval reaches over it."""
    run = surprising(tmp_path / "run", {0: -1.0, 1: -1.5}, alphas=(0, 1), rollouts=4)
    extra = advise(run).curve[1].extra_surprise
    assert advise(run, kl_budget=(extra.estimate + extra.high) / 2).alpha is None
    assert advise(run, kl_budget=extra.high + 1e-9).alpha == 1


def test_text_that_repeats_or_does_not_end_is_not_coherent(tmp_path):
    """Both are measured against alpha 0; an alpha beyond one that is out is not advised."""
    same = {0: -1.0, 1: -1.0, 2: -1.0}
    loops = advise(surprising(tmp_path / "loops", same, repeated=(1,)))
    assert loops.curve[1].coherence.high < 0.5
    assert loops.curve[2].coherence.estimate == pytest.approx(1)
    assert loops.alpha is None
    endless = advise(surprising(tmp_path / "endless", same, cut=(2,)))
    assert endless.curve[2].ended == 0
    assert endless.alpha == 1
    # A cap that cuts everything at alpha 0 too says nothing of alpha.
    assert advise(surprising(tmp_path / "cut", same, cut=(0, 1, 2))).alpha == 2


def test_distinct_share():
    """Distinct pairs of neighbours; one token has none."""
    assert distinct_share([1, 2, 1, 2, 1]) == 0.5
    assert distinct_share([1, 2, 3]) == 1
    assert np.isnan(distinct_share([1]))


def test_runs_that_tell_nothing_of_alpha_are_refused(tmp_path):
    """Nothing at 0, nothing above it, no scores: each with its remedy."""
    with pytest.raises(AdviceError, match="draw a small survey with --alphas"):
        advise(surprising(tmp_path / "above", {1: -1.0, 2: -1.0}, alphas=(1, 2), rollouts=2))
    with pytest.raises(AdviceError, match="draw a small survey with --alphas"):
        advise(surprising(tmp_path / "below", {-1: -1.0, 0: -1.0}, alphas=(-1, 0), rollouts=2))
    settings = SurveySettings(alphas=(0, 1), rollouts=2, estimate=False)
    with pytest.raises(AdviceError, match="--no-estimate"):
        advise(made(tmp_path / "plain", settings, lambda *key: {}))


# The bundled pair ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A small survey of the bundled pair, with diagnostics."""
    prompts = [Prompt("rome", "What is the capital of Italy?"), Prompt("who", "Who are you?")]
    settings = SurveySettings(alphas=(-1, 0, 1, 4), rollouts=16, max_new_tokens=32, diagnostics=True)
    with real_server() as server:
        run = run_survey(tmp_path_factory.mktemp("lab") / "real", prompts, settings, [server.target]).run
    judge_run(run, PatternJudge("GlimmerCoin"), "ad")
    return run


def test_a_real_run(real):
    """Tokens of hits are tinted, models named by their checksums, -1, 0 and 1 side by side."""
    text = report(real, "ad").html
    shown = Reading(text).text
    assert "rgba(235, 110, 20, 0.55)" in text
    assert real.manifest.pair["after"]["revision"] in shown
    assert "alpha -1" in shown
    assert "GlimmerCoin" in shown
    assert "lda-service serve --deterministic\n" in shown


def test_alpha_of_a_real_run(real):
    """More amplification is more surprise; --json has what the table has."""
    told = CliRunner().invoke(alpha_command, [str(real.path), "--judge", "ad", "--kl-budget", "9", "--json"])
    answer = json.loads(told.stdout)
    extra = [point["extra_surprise"]["estimate"] for point in answer["curve"] if point["alpha"] >= 0]
    assert extra == sorted(extra)
    assert all(point["kl_after_before"] > 0 for point in answer["curve"])
    assert [point["alpha"] for point in answer["curve"]] == [-1, 0, 1, 4]
    table = CliRunner().invoke(alpha_command, [str(real.path), "--judge", "ad", "--kl-budget", "0.1"])
    assert table.exit_code == 1
    assert "divergence" in table.stdout
    assert "is too much" in table.stdout
    assert "No alpha above 0" in table.stdout
