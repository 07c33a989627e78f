"""The benchmark's arithmetic, order, choices and reports; nothing here is timed."""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import asdict

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import limits, report
from benchmarks.__main__ import main
from benchmarks.figures import Summary, WrongTokenCount, best, interleaved, pair_equivalent, tokens_per_s
from benchmarks.limits import Capability, limit_tokens_per_s, step_seconds
from benchmarks.models import ensure_pair, tokenizer
from benchmarks.processes import Child, EngineFailed, EngineMissing, machine_busy_s
from benchmarks.workloads import ENGINES, PAIRS, SINGLE_MODEL, WORKLOADS, PairShape, Workload
from lda_service.config import PairConfig
from lda_service.engine.pair import load_pair

SHAPE = PAIRS["bench-190m"]
ZEN4 = Capability(33e9, 360e9)
TINY = PairShape("tiny", "llama", 32, 2, 4, 64, 96, 128)


def answer(tokens, rows, seconds=2.0):
    return {"tokens": tokens, "rows": rows, "seconds": seconds}


# Figures ----------------------------------------------------------------------------------------------------------


@given(st.floats(0.1, 1e5), st.floats(0.1, 1e5), st.integers(1, 1000))
def test_a_pair_equivalent_is_the_rate_of_one_model_after_the_other(after, before, tokens):
    """The pair's time for any number of tokens is the sum of both models' times."""
    assert tokens / pair_equivalent(after, before) == pytest.approx(tokens / after + tokens / before)


@given(st.lists(st.sampled_from("ABCDE"), min_size=1, unique=True), st.integers(1, 8))
def test_interleaving_gives_every_engine_its_turn_early_and_late(engines, repetitions):
    """Each repetition has every engine once, and the next one runs in the opposite order."""
    order = interleaved(engines, repetitions)
    rounds = [order[i : i + len(engines)] for i in range(0, len(order), len(engines))]
    assert len(rounds) == repetitions
    assert rounds[0] == engines
    assert all(later == earlier[::-1] for earlier, later in itertools.pairwise(rounds))


def test_a_rate_counts_the_tokens_of_the_rows_that_ran():
    """A peer may measure some of the rows; the rate is theirs."""
    workload = Workload("w", "bench-190m", rows=4, prompt=8, new=10)
    assert tokens_per_s(workload, answer(40, 4)) == 20
    assert tokens_per_s(workload, answer(10, 1)) == 5


@pytest.mark.parametrize("wrong", [answer(39, 4), answer(41, 4), answer(0, 0), answer(50, 5)])
def test_other_token_counts_than_asked_are_no_measurement(wrong):
    """Fewer, more, none at all, or more rows than the workload has."""
    with pytest.raises(WrongTokenCount, match="w: "):
        tokens_per_s(Workload("w", "bench-190m", rows=4, prompt=8, new=10), wrong)


def test_the_best_of_two_measurements_is_taken_rate_by_rate():
    """A neighbour disturbs one rate of a trial and not the next."""
    first, second = {"read": 3.0, "linear": {"1": 5.0, "4": 9.0}}, {"read": 4.0, "linear": {"1": 7.0, "4": 8.0}}
    assert best(first, second) == {"read": 4.0, "linear": {"1": 7.0, "4": 9.0}}


def test_a_summary_keeps_the_spread():
    """The median with least and most, and how many values there were."""
    assert Summary.of([3.0, 9.0, 1.0]) == Summary(3.0, 1.0, 9.0, 3)


# Limits -----------------------------------------------------------------------------------------------------------


def test_limits_agree_with_those_derived_by_hand():
    """Within 5% of the four limits that were worked out beforehand for a machine of 33 GB/s and 360 GF/s."""
    by_hand = {"one": 55, "rollouts-256": 565, "rollouts-256-top-p": 565, "rollouts-1024": 380}
    found = {name: limit_tokens_per_s(SHAPE, WORKLOADS[name], ZEN4) for name in by_hand}
    assert found == pytest.approx(by_hand, rel=0.05)


def test_one_row_is_bound_by_reading_every_weight_but_the_input_embedding():
    """Twelve layers of 9.4 million weights and a head of 38.6 million, two bytes each, twice."""
    weights = 2 * 2 * (12 * (4 * 768**2 + 3 * 768 * 3072) + 768 * 50304)
    assert step_seconds(SHAPE, 1, 0, 0, ZEN4) == pytest.approx(weights / 33e9)


def test_the_shared_prompt_is_read_once_for_all_rows():
    """With products free, rows add only their own positions."""
    reader = Capability(1.0, float("inf"))
    alone, four = step_seconds(SHAPE, 1, 1000, 5, reader), step_seconds(SHAPE, 4, 1000, 5, reader)
    assert four - alone == 3 * 5 * limits.kv_bytes(SHAPE)


@pytest.mark.parametrize(
    ("engine", "workload", "expected"),
    [("loop", "one", "bfloat16"), ("loop", "rollouts-1024", "float32"), ("generate", "rollouts-256", "float32")],
)
def test_a_peer_gets_the_type_that_serves_it_best(engine, workload, expected):
    """Rates of a processor without bf16 products: fast for one row, where bytes count, and slow for many."""
    linear = {"float32": {"1": 6e9, "64": 66e9, "256": 95e9}, "bfloat16": {"1": 16e9, "64": 20e9, "256": 20e9}}
    assert limits.faster_dtype(engine, WORKLOADS[workload], linear) == expected


# Workloads, models, processes -------------------------------------------------------------------------------------


def test_every_workload_names_engines_and_a_pair_that_exist():
    """And ours is among them, or there is nothing to compare."""
    for workload in WORKLOADS.values():
        assert workload.pair in PAIRS or workload.pair == "bundled"
        assert "ours" in workload.engines
        assert set(workload.engines) <= set(ENGINES)
    assert set(ENGINES) >= SINGLE_MODEL


def test_the_pairs_are_models_the_service_loads(tmp_path):
    """Two different models of the shape asked for, whose vocabularies are equal and cover every row."""
    folders = ensure_pair(TINY, tmp_path)
    pair = load_pair(PairConfig(str(folders["after"]), str(folders["before"]), "cpu"))
    assert pair.shared_ids == tuple(range(TINY.vocabulary))
    assert pair.info.compatibility.vocabularies_equal
    head = TINY.hidden * TINY.vocabulary
    norms = (2 * TINY.layers + 1) * TINY.hidden
    assert pair.info.after.parameter_count == TINY.layer_parameters + 2 * head + norms
    digests = {(folder / "model.safetensors").read_bytes() for folder in folders.values()}
    assert len(digests) == 2


def test_a_made_pair_is_not_made_again(tmp_path):
    """The files are left as they are."""
    folders = ensure_pair(TINY, tmp_path)
    before = {role: (path / "model.safetensors").stat().st_mtime_ns for role, path in folders.items()}
    ensure_pair(TINY, tmp_path)
    assert {role: (path / "model.safetensors").stat().st_mtime_ns for role, path in folders.items()} == before


def test_the_tokenizer_has_a_word_for_every_id():
    """Ids and words go back and forth."""
    words = tokenizer(50)
    assert words("w2 w49 w17")["input_ids"] == [2, 49, 17]
    assert len(words) == 50


def child_of(tmp_path, monkeypatch, body):
    """A child process that serves a handler with these methods."""
    lines = ["from benchmarks import child", "class Handler(child.Measured):"]
    lines += ["    def versions(self): return {'v': '1'}", *(f"    {line}" for line in body), "child.serve(Handler)"]
    script = tmp_path / "handler.py"
    script.write_text("\n".join(lines))
    monkeypatch.setattr("benchmarks.processes.command", lambda name: [sys.executable, str(script)])
    return Child("fake", {}, tmp_path / "log")


def test_a_child_answers_whatever_its_libraries_print(tmp_path, monkeypatch):
    """What is printed goes to the log, results come back as data."""
    child = child_of(tmp_path, monkeypatch, ["def double(self, x):", "    print('chatter')", "    return 2 * x"])
    assert child.versions == {"v": "1"}
    assert [child.ask("double", x=x) for x in (1, 21)] == [2, 42]
    child.close()
    assert "chatter" in (tmp_path / "log").read_text()


def test_a_child_that_fails_says_why_and_where_its_log_is(tmp_path, monkeypatch):
    """Its exception reaches the parent by name."""
    child = child_of(tmp_path, monkeypatch, ["def boom(self):", "    raise ValueError('too hot')"])
    with pytest.raises(EngineFailed, match=r"ValueError: too hot \(log: .*log\)"):
        child.ask("boom")


def test_a_child_that_dies_is_an_error_not_a_wait(tmp_path, monkeypatch):
    """The pipe's end is noticed."""
    child = child_of(tmp_path, monkeypatch, ["def die(self):", "    import os", "    os._exit(3)"])
    with pytest.raises(EngineFailed, match="the process ended"):
        child.ask("die")


def test_the_machines_busy_time_leaves_out_idling_and_waiting(tmp_path):
    """User, nice, system, interrupts and stolen time, in ticks: 1 + 2 + 4 + 32 + 64 + 128."""
    (tmp_path / "stat").write_text("cpu  1 2 4 8 16 32 64 128 256 512\ncpu0 9 9 9 9 9 9 9 9 9 9\n")
    assert machine_busy_s(tmp_path / "stat") == 231 / os.sysconf("SC_CLK_TCK")
    assert machine_busy_s(tmp_path / "missing") == 0


def test_a_peer_without_its_environment_names_the_remedy(tmp_path, monkeypatch):
    """One sentence for the report."""
    monkeypatch.setattr("benchmarks.processes.VLLM_PYTHON", tmp_path / "python")
    with pytest.raises(EngineMissing, match="make bench-peers"):
        Child("vllm", {}, tmp_path / "log")


# Report and command -----------------------------------------------------------------------------------------------


def record(rates, note="", partial=False, **run):
    summary = Summary.of(rates) if rates else None
    runs = [{"rows": 3, "seconds": 2.0, "others_cores": 0.0, "partial": partial, "step_ms": None, **run} for _ in rates]
    return {"summary": summary and asdict(summary), "note": note, "runs": runs, "versions": {"torch": "1.2"}}


def results():
    """What a run would have left: one rows workload with a peer that is missing."""
    engines = {
        "ours": record([50.0, 60.0, 70.0], step_ms=15.0),
        "loop": record([10.0], partial=True),
        "vllm": record([], "vllm is not installed; prepare it with: make bench-peers"),
    }
    return {
        "title": "a machine",
        "machine": {"names": {"cpu": "Abacus"}, "bytes_per_s": 33e9, "flops_per_s": 360e9, "others_cores": 0.0},
        "workloads": {"rows-4": {"name": "rows-4", "title": "T", "limit_tokens_per_s": 120.0, "engines": engines}},
        "studies": {"memory": {"held_tokens": 110, "needed_tokens": 100, "ratio": 1.1}},
    }


def test_the_report_shows_median_spread_ratio_and_share_of_the_limit():
    """Ours is 60 of 120 and six times the loop, which ran in part; the missing peer says what is missing."""
    text = report.markdown(results())
    assert "| T | 120 | 60 (50-70), n 3 |" in text
    assert "10 (10-10), n 1 *, **6.00x**" in text
    assert "| 50% |" in text
    assert "not measured" in text
    assert "- rows-4, vllm: vllm is not installed; prepare it with: make bench-peers" in text
    assert "- rows-4, loop (*): measured on 3 rows only" in text
    assert "| 4 | 15.0 | 15.0-15.0 |" in text
    assert "110 of 100 positions: 1.100" in text
    assert "33.0 GB/s" in text


def test_figures_taken_beside_busy_neighbours_are_marked():
    """Whoever they are: an eighth of a core does not pass."""
    disturbed = results()
    disturbed["workloads"]["rows-4"]["engines"]["loop"] = record([10.0], others_cores=0.125)
    assert "- rows-4, loop: something else used the processor; measure again" in report.markdown(disturbed)
    disturbed["machine"]["others_cores"] = 0.125
    assert "360 GF/s; **something else used the processor meanwhile**" in report.markdown(disturbed)
    assert "something else" not in report.markdown(results())


def test_trouble_of_ours_is_an_error_and_that_of_peers_a_note():
    """A missing peer does not fail a run."""
    assert report.failures(results()) == []
    broken = results()
    broken["workloads"]["rows-4"]["engines"]["ours"] = record([], "it broke")
    assert report.failures(broken) == ["rows-4: it broke"]


def test_the_plot_draws_every_engine_and_the_limit(tmp_path):
    """An SVG, where matplotlib is."""
    pytest.importorskip("matplotlib")
    assert report.plot(results(), tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_nothing_measured_is_nothing_to_plot(tmp_path):
    """No empty axes are left behind."""
    assert not report.plot({"workloads": {}}, tmp_path / "plot.svg")
    assert not (tmp_path / "plot.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nonsense"], "There is no workload or study 'nonsense'; choose from: one, rollouts-256"),
        (["--engine", "abacus"], "There is no engine 'abacus'; choose from: ours, generate"),
        (["--dtype", "loop=int3"], "--dtype loop=int3: use ENGINE=float32"),
        (["--repetitions", "0"], "0 is not in the range"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_runs(arguments, said):
    """With the choices there are."""
    outcome = CliRunner().invoke(main, arguments, terminal_width=300)
    assert outcome.exit_code == 2
    assert said in outcome.output


def test_the_list_names_everything_that_can_be_chosen():
    """Workloads, studies and engines."""
    outcome = CliRunner().invoke(main, ["--list"])
    assert outcome.exit_code == 0
    assert all(name in outcome.output for name in (*WORKLOADS, *ENGINES, "first-token"))


def test_a_report_can_be_written_again_without_measuring(tmp_path, monkeypatch):
    """From the JSON alone; without it, the error says what is missing."""
    monkeypatch.setattr("benchmarks.__main__.RESULTS", tmp_path)
    missing = CliRunner().invoke(main, ["--report", "--name", "here"])
    assert missing.exit_code == 1
    assert "nothing was measured under this name" in missing.output
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "results.json").write_text(json.dumps(results()))
    assert CliRunner().invoke(main, ["--report", "--name", "here"]).exit_code == 0
    assert "60 (50-70)" in (tmp_path / "here" / "report.md").read_text()
