"""`lda checkpoints`: behaviours over checkpoints, on run folders drawn from pairs whose rates are known exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import lda_client._cli  # noqa: F401  # before the lab's commands
import numpy as np
import pytest
from click.testing import CliRunner
from exact_pairs import ExactPair
from lda_client.lab import Prompt, RunError, SurveySettings
from lda_client.lab.checkpoints import (
    CheckpointsDiffer,
    checkpoints_page,
    compare_checkpoints,
    heat_map,
)
from lda_client.lab.cli_report import checkpoints
from lda_client.lab.prompts import to_jsonl
from lda_client.lab.runs import prompts_path
from scipy import stats
from test_lab_estimate import draw, give_verdicts

ALPHAS, ROLLOUTS = (0.0, 0.5, 1.0), 300
LABELS = ("step 0", "step <1>", "$x$ step 2")
PROMPTS = (Prompt("one", "First?"), Prompt("two", "Second?"))


def drawn(folder, rate, seed, settings=None, prompts=PROMPTS):
    """A run of a checkpoint with this rate, judged by two judges."""
    settings = settings or SurveySettings(alphas=ALPHAS, rollouts=ROLLOUTS)
    run, hits = draw(folder, ExactPair(rate), np.random.default_rng(seed), settings)
    prompts_path(folder).write_text(to_jsonl(prompts))
    give_verdicts(run, "exact", hits.tolist())
    give_verdicts(run, "never", [False] * len(hits))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three checkpoints: two alike, then one that shows the behaviour more often."""
    folder = tmp_path_factory.mktemp("lab")
    rates = (1e-3, 1e-3, 1e-2)
    return {
        label: drawn(folder / str(place), rate, place)
        for place, (label, rate) in enumerate(zip(LABELS, rates, strict=True))
    }


def test_alarms_are_where_the_rate_departs(runs):
    """The checkpoint that changed is marked at amplified alphas, the one that did not nowhere."""
    timeline = compare_checkpoints(runs, ["exact", "never"])
    assert len(timeline.cells) == 2 * 3 * len(ALPHAS)
    assert {cell.checkpoint for cell in timeline.alarms} == {LABELS[2]}
    assert {cell.behaviour for cell in timeline.alarms} == {"exact"}
    assert {0.5, 1.0} <= {cell.alpha for cell in timeline.alarms}
    assert {cell.alarm for cell in timeline.alarms} == {"up"}
    assert all(cell.low <= cell.rate <= cell.high for cell in timeline.cells)


def test_a_rate_that_falls_is_marked_too(runs):
    """Backwards in time the same cells go down."""
    timeline = compare_checkpoints(dict(reversed(runs.items())), ["exact"])
    assert timeline.checkpoints[0] == LABELS[2]
    assert {cell.alarm for cell in timeline.alarms} == {"down"}


def test_q_holds_down_false_alarms_over_all_cells(runs):
    """q is Benjamini and Hochberg's over every cell but those of the first checkpoint."""
    timeline = compare_checkpoints(runs, ["exact", "never"], false_alarms=0.01)
    tested = [cell for cell in timeline.cells if cell.checkpoint != LABELS[0]]
    assert [cell.q for cell in tested] == pytest.approx(stats.false_discovery_control([cell.p for cell in tested]))
    assert all(np.isnan(cell.q) for cell in timeline.cells if cell.checkpoint == LABELS[0])
    assert all((cell.q <= 0.01) == bool(cell.alarm) for cell in tested)


def test_many_checkpoints_that_are_alike_raise_few_alarms(tmp_path):
    """Over repeated timelines in which nothing changes, hardly any raises an alarm."""
    raised = 0
    for repetition in range(12):
        settings = SurveySettings(alphas=(0.0, 1.0), rollouts=50, slopes=False)
        alike = {
            str(place): drawn(tmp_path / f"{repetition}-{place}", 1e-2, 100 * repetition + place, settings)
            for place in range(4)
        }
        raised += bool(compare_checkpoints(alike, ["exact"]).alarms)
    assert raised <= 1


def test_pictures_escape_labels(runs):
    """Labels with markup or dollars are text; a frame and an arrow mark an alarm; the page lists every cell."""
    timeline = compare_checkpoints(runs, ["exact"])
    picture = heat_map(timeline, "exact").html
    assert "step &lt;1&gt;" in picture
    assert "$x$ step 2" in picture
    assert picture.count("▲") == len(timeline.alarms)
    assert "currentColor" in picture
    html = checkpoints_page(timeline).html
    assert "<1>" not in html
    assert "<script" not in html
    assert html.count("<tr>") == 1 + len(timeline.cells)
    assert picture in html
    assert picture in timeline._repr_html_()


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    """Each difference is named, with what to do about it."""
    first = runs[LABELS[0]]
    with pytest.raises(CheckpointsDiffer, match="at least two"):
        compare_checkpoints({"one": first}, ["exact"])
    small = SurveySettings(alphas=(0.25, 2.0), rollouts=5)
    with pytest.raises(CheckpointsDiffer, match="No alpha"):
        compare_checkpoints({"a": first, "b": drawn(tmp_path / "alphas", 1e-2, 1, small)}, ["exact"])
    other = drawn(tmp_path / "prompts", 1e-2, 1, small, [*PROMPTS[:1], Prompt("two", "Other?")])
    with pytest.raises(CheckpointsDiffer, match="other prompts"):
        compare_checkpoints({"a": first, "b": other}, ["exact"])
    warm = drawn(tmp_path / "warm", 1e-2, 1, replace(small, temperature=0.5))
    with pytest.raises(CheckpointsDiffer, match=r"b: was drawn with temperature 0\.5"):
        compare_checkpoints({"a": first, "b": warm}, ["exact"])
    judged = drawn(tmp_path / "judged", 1e-2, 1)
    keys = judged.rollouts(["prompt_id", "alpha", "sequence"])
    judged.write_verdicts("exact", keys, judged.verdicts("exact"), {"kind": "another"})
    with pytest.raises(CheckpointsDiffer, match="judge both runs with the same command"):
        compare_checkpoints({"a": first, "b": judged}, ["exact"])
    with pytest.raises(RunError, match="no judge"):
        compare_checkpoints(runs, ["nobody"])


def test_alphas_that_not_all_have_are_left_out_and_told(runs, tmp_path):
    """The comparison is over what all runs have."""
    more = drawn(tmp_path / "more", 1e-3, 9, SurveySettings(alphas=(0.5, 1.0, 4.0), rollouts=50))
    timeline = compare_checkpoints({"a": runs[LABELS[0]], "b": more}, ["exact"])
    assert timeline.alphas == (0.5, 1.0)
    assert "alpha 0, 4" in timeline.notes[0]


def test_the_command(runs, tmp_path):
    """Labels and their order are those of NAME=RUN; table, JSON, SVG and HTML tell the same."""
    named = [f"{label}={run.path}" for label, run in zip("zya", runs.values(), strict=True)]
    told = CliRunner().invoke(checkpoints, [*named, "--judge", "exact"])
    assert told.exit_code == 0, told.output
    assert told.stdout.index(" z ") < told.stdout.index(" y ") < told.stdout.index(" a ")
    assert "▲" in told.stdout
    assert "exact at alpha 1: a departs from z, up to" in told.stdout
    page = tmp_path / "timeline.html"
    asked = CliRunner().invoke(checkpoints, [*named, "--judge", "exact", "--json", "--out", str(page)])
    answer = json.loads(asked.stdout)
    assert answer["checkpoints"] == ["z", "y", "a"]
    timeline = compare_checkpoints(runs, ["exact"])
    assert [cell["rate"] for cell in answer["cells"]] == [cell.rate for cell in timeline.cells]
    assert answer["cells"][0]["q"] is None
    assert page.read_text().startswith("<!doctype html>")
    picture = tmp_path / "timeline.svg"
    assert CliRunner().invoke(checkpoints, [*named, "--judge", "exact", "--out", str(picture)]).exit_code == 0
    assert picture.read_text().startswith("<svg")


def test_wrong_usage_is_told(runs, tmp_path):
    """One name twice, an SVG of two behaviours, a file of another kind: exit 2 before anything is read."""
    folder = str(runs[LABELS[0]].path)
    assert CliRunner().invoke(checkpoints, [folder, folder, "--judge", "exact"]).exit_code == 2
    two = ["--judge", "exact", "--judge", "never"]
    assert CliRunner().invoke(checkpoints, [f"a={folder}", f"b={folder}", *two, "--out", "x.svg"]).exit_code == 2
    assert CliRunner().invoke(checkpoints, [f"a={folder}", f"b={folder}", *two, "--out", "x.png"]).exit_code == 2
