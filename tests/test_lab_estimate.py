"""`lda estimate` over run folders that were drawn from pairs whose rate is known exactly."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from exact_pairs import ExactPair
from lda_client._cli import lda
from lda_client.lab import RunError, SurveySettings
from lda_client.lab.estimate import Quality, corrected, estimate_run
from lda_client.lab.estimators import naive
from lda_client.lab.runs import Manifest, Run, rollout_schema

RATE, ALPHAS, ROLLOUTS = 1e-2, (0.0, 0.25, 0.5, 0.75, 1.0, 1.5), 1500


def draw(folder, pair, rng, settings=None, prompts=("one", "two")):
    """A run folder as `lda survey` leaves it, and whether each rollout truly is a hit."""
    settings = settings or SurveySettings(alphas=ALPHAS, rollouts=ROLLOUTS)
    scores = np.stack([pair.log_q(alpha) for alpha in settings.score_alphas], axis=1) if settings.estimate else None
    columns, hits = {name: [] for name in rollout_schema(settings).names}, []
    for prompt in prompts:
        for alpha in settings.alphas:
            cumulative = np.exp(pair.log_q(alpha)).cumsum()
            rows = np.searchsorted(cumulative, rng.random(settings.rollouts) * cumulative[-1])
            hits += pair.hits[rows].tolist()
            columns["prompt_id"] += [prompt] * len(rows)
            columns["alpha"] += [alpha] * len(rows)
            columns["sequence"] += range(len(rows))
            columns["text"] += [" ".join(map(str, pair.sequences[row])) for row in rows]
            if scores is not None:
                columns["score_logprobs"] += scores[rows].tolist()
    count = len(hits)
    columns |= {"seed": [0] * count, "output_tokens": [6] * count, "finish_reason": ["MAX_TOKENS"] * count}
    columns["token_ids"] = [[]] * count
    folder.mkdir()
    run = Run(folder, Manifest(settings, "", False, {"fingerprint": "exact"}, "2026-01-01"))
    run.save()
    pq.write_table(pa.Table.from_pydict(columns, schema=rollout_schema(settings)), run.rollouts_path)
    return run, np.array(hits)


def give_verdicts(run, name, hits):
    """Verdicts as `lda judge` keeps them; None is no verdict."""
    keys = run.rollouts(["prompt_id", "alpha", "sequence"])
    verdicts = pl.DataFrame(
        {"hit": pl.Series(hits, dtype=pl.Boolean), "score": pl.Series([None] * len(keys), dtype=pl.Float64)}
    )
    run.write_verdicts(name, keys, verdicts, {"kind": "exact"})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """One run and its true hits."""
    run, hits = draw(tmp_path_factory.mktemp("lab") / "run", ExactPair(RATE), np.random.default_rng(1))
    give_verdicts(run, "exact", hits.tolist())
    return run, hits


def test_three_answers_from_one_run(drawn):
    """Counted, weighted and extrapolated: each interval holds the truth, and the weighted one is the narrowest."""
    found = estimate_run(drawn[0], "exact")
    by_method = {each.method: each for each in found.estimates}
    assert set(by_method) == {"naive", "pooled", "path"}
    assert all(each.low <= RATE <= each.high for each in found.estimates)
    widths = {method: each.high / each.low for method, each in by_method.items()}
    assert widths["pooled"] < widths["naive"]
    assert by_method["naive"].rollouts == 2 * ROLLOUTS
    assert by_method["path"].diagnostics["slopes"] == len(ALPHAS) - 1
    assert [rate.alpha for rate in found.by_alpha] == list(ALPHAS)
    assert sum(rate.hits for rate in found.by_alpha) == drawn[1].sum()


def test_a_prompt_by_itself(drawn):
    """`prompt_ids` leaves the others out; one that is not there is named."""
    found = estimate_run(drawn[0], "exact", ["two"])
    assert (found.prompts, found.estimates[0].rollouts) == (1, ROLLOUTS)
    with pytest.raises(RunError, match="no rollouts of the prompt 'three'"):
        estimate_run(drawn[0], "exact", ["three"])


def test_a_judge_that_errs_is_taken_out(drawn):
    """A judge that misses a fifth and raises false alarms misleads; with its measured errors the truth is inside."""
    run, hits = drawn
    rng = np.random.default_rng(6)
    seen = np.where(hits, rng.random(len(hits)) < 0.8, rng.random(len(hits)) < 0.01)
    give_verdicts(run, "hasty", seen.tolist())
    plain = estimate_run(run, "hasty").estimates[0]
    assert not plain.low <= RATE <= plain.high
    counts = {
        "both": int((seen & hits).sum()),
        "first_only": int((seen & ~hits).sum()),
        "second_only": int((~seen & hits).sum()),
        "neither": int((~seen & ~hits).sum()),
    }
    run.quality_path("hasty").write_text(json.dumps({"counts": counts}))
    found = estimate_run(run, "hasty")
    assert found.quality.sensitivity == pytest.approx(0.8, abs=0.02)
    counted = found.estimates[0]
    assert counted.low <= RATE <= counted.high
    assert counted.diagnostics["observed_rate"] == plain.rate
    assert counted.high - counted.low > 0.8 * (plain.high - plain.low)


def test_correction_covers_the_truth():
    """Over many small studies with a judge that is itself measured on few, intervals hold the truth often enough."""
    rng, covered = np.random.default_rng(4), 0
    true, sensitivity, specificity = 0.05, 0.85, 0.97
    for _ in range(300):
        observed = true * sensitivity + (1 - true) * (1 - specificity)
        found, passed = rng.binomial(60, sensitivity), rng.binomial(200, specificity)
        quality = Quality(found, 60 - found, 200 - passed, passed)
        estimate = corrected(naive(int(rng.binomial(1000, observed)), 1000), quality)
        covered += estimate.low <= true <= estimate.high
    assert covered >= 276


def test_a_judge_like_a_coin_is_refused():
    """No rate is made of verdicts that tell nothing."""
    estimate = corrected(naive(50, 100), Quality(50, 50, 48, 52))
    assert estimate.rate is None
    assert "hardly better than chance" in estimate.refusals[0]


def test_rollouts_without_a_verdict_are_left_out_and_counted(drawn):
    """A judge that decided a random part gives the same rates from fewer rollouts."""
    run, hits = drawn
    kept = np.random.default_rng(3).random(len(hits)) < 0.5
    give_verdicts(run, "half", [bool(hit) if keep else None for hit, keep in zip(hits, kept, strict=True)])
    found = estimate_run(run, "half")
    assert found.undecided == (~kept).sum()
    assert sum(rate.rollouts for rate in found.by_alpha) == kept.sum()
    assert found.estimates[1].low <= RATE <= found.estimates[1].high


def test_a_run_without_scores_is_refused(tmp_path):
    """A survey drawn for no estimates says so, instead of giving one."""
    settings = SurveySettings(alphas=(0.0, 1.0), rollouts=20, estimate=False)
    run, hits = draw(tmp_path / "run", ExactPair(RATE), np.random.default_rng(1), settings)
    give_verdicts(run, "exact", hits.tolist())
    with pytest.raises(RunError, match="--no-estimate"):
        estimate_run(run, "exact")


def test_the_command(drawn):
    """`lda estimate` prints rates by alpha and three answers; --json has the same numbers."""
    run = str(drawn[0].path)
    told = CliRunner().invoke(lda, ["estimate", run, "--judge", "exact"])
    assert told.exit_code == 0, told.output
    assert "all alphas, weighted back to 0" in told.output
    asked = CliRunner().invoke(lda, ["estimate", run, "--judge", "exact", "--json"])
    answers = json.loads(asked.stdout)
    found = estimate_run(drawn[0], "exact")
    assert [each["rate"] for each in answers["estimates"]] == [each.rate for each in found.estimates]


def test_no_answer_is_told_with_its_reason(drawn):
    """Verdicts without a hit give an upper end from alpha 0 alone; the others say why they have none."""
    run, hits = drawn
    give_verdicts(run, "none", [False] * len(hits))
    told = CliRunner().invoke(lda, ["estimate", str(run.path), "--judge", "none"])
    assert told.exit_code == 0
    assert "no answer, since no rollout shows the behaviour at any alpha" in told.stdout
    unknown = CliRunner().invoke(lda, ["estimate", str(run.path), "--judge", "nobody"])
    assert unknown.exit_code == 1
    assert "no judge 'nobody'" in unknown.stderr


def test_plan():
    """`lda plan` tells the rollouts for a rate, and refuses what is none."""
    told = CliRunner().invoke(lda, ["plan", "1e-4", "--json"])
    assert json.loads(told.stdout) == {"rate": 1e-4, "rollouts_to_see": 29956, "rollouts_to_measure": 39996}
    assert CliRunner().invoke(lda, ["plan", "2"]).exit_code == 2
