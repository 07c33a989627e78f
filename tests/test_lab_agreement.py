"""Agreement between judges: kappa against published values, sensitivity and specificity with exact intervals."""

import json
import math

import polars as pl
import pytest
from click.testing import CliRunner
from lab_harness import PROMPTS, answer, quick
from lda_client._cli import lda
from lda_client.lab import JudgeError, RunError, run_survey
from lda_client.lab.agreement import Agreement, agree, cohen_kappa, share
from lda_client.lab.judges import PatternJudge, judge_run
from lda_client.testing import FakeServer


def test_kappa_of_published_tables():
    """Fleiss, Levin and Paik, Statistical Methods for Rates and Proportions (2003), table 18.1: 0.68, error 0.087."""
    kappa = cohen_kappa([[75, 1, 4], [5, 4, 1], [0, 0, 10]])
    assert kappa.estimate == pytest.approx(0.676, abs=5e-4)
    assert (kappa.high - kappa.low) / (2 * 1.959964) == pytest.approx(0.0877, abs=5e-5)
    assert cohen_kappa([[20, 5], [10, 15]]).estimate == pytest.approx(0.4)
    assert cohen_kappa([[45, 15], [25, 15]]).estimate == pytest.approx(0.1304, abs=5e-5)
    assert cohen_kappa([[25, 35], [5, 35]]).estimate == pytest.approx(0.2593, abs=5e-5)


def test_kappa_at_its_ends():
    """Perfect agreement is 1 without error; two judges that say one thing only have no kappa."""
    assert cohen_kappa([[5, 0], [0, 5]]) == pytest.approx((1, 1, 1))
    assert cohen_kappa([[0, 5], [5, 0]]).estimate == pytest.approx(-1)
    assert math.isnan(cohen_kappa([[9, 0], [0, 0]]).estimate)
    assert math.isnan(cohen_kappa([[0, 0], [0, 0]]).estimate)


def test_shares():
    """The exact interval of 0 of 30 ends at 1 - 0.025 ** (1 / 30); of nothing, anything is possible."""
    assert share(0, 30) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 30)))
    assert share(0, 0)[1:] == (0.0, 1.0)


def test_sensitivity_and_specificity():
    """8 of 10 hits found, 85 of 90 others left alone."""
    agreement = Agreement(both=8, first_only=5, second_only=2, neither=85)
    assert agreement.sensitivity.estimate == pytest.approx(0.8)
    assert agreement.specificity.estimate == pytest.approx(85 / 90)
    assert agreement.sensitivity.low == pytest.approx(0.4439, abs=1e-4)  # R: binom.test(8, 10)
    assert agreement.observed.estimate == pytest.approx(0.93)


@pytest.fixture
def run(tmp_path):
    """A run with two judges, of which the second decided only some."""
    with FakeServer(answer) as server:
        run = run_survey(tmp_path / "run", PROMPTS, quick(), [server.target]).run
    frame = judge_run(run, PatternJudge("a"), "one")
    labels = [("b" in text) if place % 2 else None for place, text in enumerate(frame["text"])]
    verdicts = pl.DataFrame({"hit": labels, "score": [None] * 40}, schema={"hit": pl.Boolean, "score": pl.Float64})
    run.write_verdicts("two", frame, verdicts, {"kind": "human"})
    return run


def test_only_what_both_decided_counts(run):
    """The rest is counted as undecided."""
    agreement = agree(run, "one", "two")
    texts = run.rollouts()["text"].to_list()[1::2]
    assert (agreement.labelled, agreement.undecided) == (20, 20)
    assert agreement.both == sum("a" in text and "b" in text for text in texts)
    assert agreement.first_only == sum("a" in text and "b" not in text for text in texts)
    assert agreement.second_only == sum("a" not in text and "b" in text for text in texts)
    with pytest.raises(RunError, match=r"no judge 'three'.*one, two"):
        agree(run, "one", "three")
    blank = pl.DataFrame({"hit": [None] * 40, "score": [None] * 40}, schema={"hit": pl.Boolean, "score": pl.Float64})
    run.write_verdicts("blank", run.rollouts(), blank, {})
    with pytest.raises(JudgeError, match="no rollout that both"):
        agree(run, "one", "blank")


def test_the_command_keeps_quality(run):
    """With --reference, as JSON for the estimators; without, nothing is kept."""
    runner = CliRunner()
    plain = runner.invoke(lda, ["agree", str(run.path), "one", "two"])
    assert plain.exit_code == 0, plain.output
    assert "kappa" in plain.stdout
    assert not run.quality_path("one").exists()
    kept = runner.invoke(lda, ["agree", str(run.path), "one", "two", "--reference"])
    assert kept.exit_code == 0, kept.output
    quality, agreement = json.loads(run.quality_path("one").read_text()), agree(run, "one", "two")
    assert quality["sensitivity"] == agreement.sensitivity._asdict()
    assert quality["specificity"] == agreement.specificity._asdict()
    assert (quality["judge"], quality["reference"], quality["labelled"]) == ("one", "two", 20)
    assert quality["reference_description"] == {"kind": "human"}
