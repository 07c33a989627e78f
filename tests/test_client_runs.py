"""The log of runs: what `lda` remembers, what it shows of it, and that it never spoils a run."""

import json
import os
import shlex
import sqlite3
import stat
import threading
from contextlib import closing

import lda_client
import pytest
from click.testing import CliRunner
from lda_client import pb
from lda_client._cli import _log, lda
from lda_client._cli._log import LogUnusable, RunLog
from lda_client.testing import HOLD, FakeServer, delta, finished, started, token


@pytest.fixture
def server():
    """A server that answers as it is told."""
    with FakeServer(["Hel", "lo"]) as running:
        yield running


@pytest.fixture
def path(tmp_path):
    """Where the log is."""
    return tmp_path / "data" / "runs.db"


@pytest.fixture
def run(server, path):
    """Run the command against that server, with that log."""

    def run(*arguments, **environment):
        known = {"LDA_TARGET": server.target, "LDA_RUNS_DB": str(path), "LDA_NO_LOG": "", "LDA_TOKEN": ""}
        return CliRunner().invoke(lda, list(arguments), env={**known, **environment})

    return run


def exported(run):
    """Every run, as `lda runs export` prints it."""
    return [json.loads(line) for line in run("runs", "export").stdout.splitlines()]


def test_a_generation_is_remembered(server, run):
    """Target, pair, request, seed, alpha, how it ended, texts and token ids; diagnostics only if there were any."""
    server.answer = [pb.Token(id=3, piece=b"Hel"), pb.Token(id=4, piece=b"lo")]
    run("generate", "Hi", "--raw", "-n", "2", "--alpha", "0.1", "--score-alphas", "0,0.1", "--seed", str(2**64 - 1))
    [found] = exported(run)
    assert (found["verb"], found["target"], found["ended"], found["error"]) == ("generate", server.target, "ok", None)
    assert (found["generation_id"], found["pair_fingerprint"]) == ("fake", "fake-pair")
    assert (found["seed"], found["alpha"]) == (str(2**64 - 1), 0.1)
    assert found["request"]["prompt"] == {"text": "Hi"}
    assert found["began_at"] <= found["ended_at"]
    assert [each["sequence_index"] for each in found["sequences"]] == [0, 1]
    assert found["sequences"][0] == {
        "role": "AMPLIFIED",
        "sequence_index": 0,
        "text": "Hello",
        "token_ids": [3, 4],
        "reason": "EOS",
        "matched_stop": None,
        "alpha_scores": {"0.0": -2.0, "0.1": -2.0},
        "tokens": None,
    }


def test_both_is_remembered(run):
    """The sequences of either model, with the role that drew them."""
    run("both", "Hi", "--json")
    [found] = exported(run)
    assert {(each["role"], each["text"]) for each in found["sequences"]} == {("AFTER", "Hello"), ("BEFORE", "Hello")}


def test_a_score_is_remembered(server, run):
    """What was scored, with its diagnostics; the pair is asked for, since the stream does not name it."""
    server.answer = [token("the", id=8, before=-2.5), token("re", id=9)]
    run("score", "Hi", "there", "--alpha", "3", "--score-alphas", "0.5")
    [found] = exported(run)
    assert (found["verb"], found["ended"], found["alpha"]) == ("score", "ok", 3)
    assert found["pair_fingerprint"] == "fake-pair"
    [scored] = found["sequences"]
    assert (scored["role"], scored["text"], scored["token_ids"]) == ("SCORED", "there", [8, 9])
    assert scored["alpha_scores"] == {"0.5": -2.0}
    assert scored["tokens"][0]["diagnostics"]["before_logprob"] == -2.5


def test_what_was_cut_short_is_remembered(server, run):
    """A failed run keeps its error, and what had arrived by then."""
    server.answer = [started(sequence_count=2), delta("a"), delta("b", 1), finished(1), lda_client.WorkerDied("Gone.")]
    assert run("generate", "Hi", "-n", "2").exit_code == 1
    [found] = exported(run)
    assert (found["ended"], found["error"]) == ("error", "WorkerDied: Gone.")
    assert [(each["text"], each["reason"]) for each in found["sequences"]] == [("a", None), ("b", "EOS")]


def test_a_deadline_is_remembered(server, run):
    """A run that ran into its deadline is an error too."""
    server.answer = ["a", HOLD]
    run("generate", "Hi", "--timeout", "0.3")
    [found] = exported(run)
    assert found["error"].startswith("DeadlineExceeded: ")


@pytest.mark.parametrize(("option", "environment"), [(["--no-log"], {}), ([], {"LDA_NO_LOG": "1"})])
def test_not_remembered_if_not_wanted(run, path, option, environment):
    """`--no-log` and LDA_NO_LOG leave no trace, not even a file."""
    assert run("generate", "Hi", *option, **environment).exit_code == 0
    assert not path.exists()


def test_only_calls_that_were_sent_are_remembered(run, path):
    """Wrong usage and lookups are no runs."""
    run("generate", "Hi", "--seed", "-1")
    run("info")
    run("compat")
    assert not path.exists()


def test_list(run):
    """The newest first, as many as asked for, with the beginning of the prompt."""
    for prompt in ("one", "two", "three\nlines " + "x" * 100):
        run("generate", prompt)
    lines = [line.split() for line in run("runs", "list", "--limit", "2").stdout.splitlines() if line.strip()]
    assert [line[0] for line in lines[2:]] == ["3", "2"]
    assert lines[2][-2:] == ["lines", "x" * 25 + "..."]
    found = [json.loads(line) for line in run("runs", "list", "--json").stdout.splitlines()]
    assert [each["id"] for each in found] == [3, 2, 1]


def test_show(server, run):
    """The texts of a run, and the command that repeats it."""
    run("generate", "Hi there", "--alpha", "2")
    shown = run("runs", "show", "1").stdout
    assert "=== amplified 0: EOS ===\nHello\n" in shown
    repeat = shown.splitlines()[-1]
    assert repeat == f"lda generate --alpha=2.0 --seed=7 --target={server.target} 'Hi there'"
    assert json.loads(run("runs", "show", "1", "--json").stdout)["sequences"][0]["text"] == "Hello"


def test_show_of_what_is_not_there(run):
    """An id that no run has is an error with a remedy, also before anything was remembered."""
    for _ in range(2):
        result = run("runs", "show", "9")
        assert result.exit_code == 1
        assert "lda runs list" in result.stderr
        run("generate", "Hi")


REPEATABLE = [
    ["generate", "Who are you?", "--system", "Be brief."],
    ["generate", "-n", "2", "--raw", "--", "--dashes\nand 'quotes'"],
    ["generate", '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]', "--prompt-json"],
    [
        "generate",
        '[{"role": "user", "content": "é"}, {"role": "assistant", "content": "So"}]',
        "--prompt-json",
        "--continue-final-message",
    ],
    ["generate", "[1, 2]", "--prompt-json"],
    [
        *(
            [
                "generate",
                "Hi",
                "--alpha",
                "0.1",
                "--temperature",
                "0.5",
                "--top-p",
                "0.25",
                "--top-k",
                "4",
                "--min-p",
                "0.125",
                "--plausibility",
                "0.0625",
            ]
        ),
        *(
            [
                "--max-new-tokens",
                "9",
                "--min-new-tokens",
                "1",
                "--ignore-eos",
                "--stop",
                "A",
                "--stop",
                "B",
                "--stop-token-id",
                "5",
            ]
        ),
        *(
            [
                "--time-budget",
                "1.5",
                "--diagnostics",
                "--top-candidates",
                "2",
                "--max-tokens-per-event",
                "8",
                "--max-event-delay",
                "0.25",
            ]
        ),
        *(["--score-alphas=-1,0.1234567"]),
    ],
    ["both", "Who are you?", "--temperature", "0", "--stop", "\n"],
    ["score", "The capital of France is", " Paris", "--raw", "--alpha", "0.3", "--top-candidates", "3"],
    ["score", "Hi", "--", "-1"],
]


@pytest.mark.parametrize("arguments", REPEATABLE, ids=lambda arguments: " ".join(arguments)[:30])
def test_the_command_repeats_the_request(server, run, arguments):
    """The printed command sends the same request, with the seed and the alpha that were in force."""
    assert run(*arguments).exit_code == 0
    repeat = shlex.split(run("runs", "show", "1").stdout.partition("To repeat it:\n")[2])
    assert run(*repeat[1:]).exit_code == 0
    first, second = [each for each in server.requests if not isinstance(each, pb.GetModelPairRequest)]
    expected = type(first)()
    expected.CopyFrom(first)
    if not isinstance(first, pb.ScoreRequest):
        expected.sampling.seed = 7
    if isinstance(first, pb.GenerateLDARequest) and not first.HasField("alpha"):
        expected.alpha = 1
    assert second == expected


def test_a_prompt_that_is_a_dash(run):
    """A prompt that would mean stdin is piped in."""
    run("generate", '"-"', "--prompt-json", "--raw")
    command = run("runs", "show", "1").stdout.splitlines()[-1]
    assert command.startswith("printf %s - | lda generate --raw ")
    assert command.endswith(" -- -")


def test_path(run, path):
    """`lda runs path` says where the prompts are; without a setting in the user's folder for data."""
    assert run("runs", "path").stdout == f"{path}\n"
    assert run("runs", "path", LDA_RUNS_DB="", XDG_DATA_HOME="/data").stdout == "/data/lda/runs.db\n"
    assert run("runs", "path", LDA_RUNS_DB="", XDG_DATA_HOME="", HOME="/me").stdout == "/me/.local/share/lda/runs.db\n"


def test_nobody_else_reads_it(run, path):
    """The file and its folder are the user's own."""
    run("generate", "Hi")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nothing_remembered_yet(run):
    """Before the first run, the list and the export are empty, and a note says why."""
    for command in ("list", "export"):
        result = run("runs", command, *(["--json"] if command == "list" else []))
        assert (result.exit_code, result.stdout) == (0, "")
        assert "No runs are remembered" in result.stderr


def test_a_log_that_cannot_be_written_spoils_nothing(run, tmp_path):
    """The run goes on with one warning; `lda runs` fails with the reason."""
    (tmp_path / "file").write_text("")
    unwritable = str(tmp_path / "file" / "runs.db")
    result = run("generate", "Hi", LDA_RUNS_DB=unwritable)
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert result.stderr.count("Warning") == 1
    assert unwritable in result.stderr
    (tmp_path / "broken.db").write_bytes(b"this is no database" * 100)
    result = run("generate", "Hi", LDA_RUNS_DB=str(tmp_path / "broken.db"))
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    result = run("runs", "list", LDA_RUNS_DB=str(tmp_path / "broken.db"))
    assert result.exit_code == 1
    assert "cannot be used" in result.stderr


def test_a_disk_that_fills_up_spoils_nothing(run, monkeypatch):
    """A failure after the run began is a warning too, and the last attempt."""

    def full(*_):
        raise LogUnusable("The disk is full.")

    monkeypatch.setattr(RunLog, "started", full)
    result = run("generate", "Hi")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert result.stderr.splitlines()[0] == "Warning: this run is not remembered. The disk is full."
    assert result.stderr.count("Warning") == 1


def test_several_write_at_once(path):
    """Logs that are opened and written at the same time, the first time too, lose nothing."""
    together = threading.Barrier(8)
    failures = []

    def write(writer):
        try:
            together.wait(10)
            with closing(RunLog(path)) as log:
                for _ in range(20):
                    run_id = log.begin("generate", f"writer-{writer}", pb.GenerateLDARequest())
                    log.started(run_id, pb.Started(seed=writer))
                    log.end(run_id, "ok")
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    with closing(RunLog(path)) as log:
        found = list(log.runs())
    assert len(found) == 160
    assert all(each["target"] == f"writer-{each['seed']}" for each in found)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_older_log_is_brought_up_to_date(path, monkeypatch):
    """A new version of the schema is one more step; runs of before stay."""
    with closing(RunLog(path)) as log:
        log.begin("generate", "there", pb.GenerateLDARequest())
    monkeypatch.setattr(_log, "MIGRATIONS", (*_log.MIGRATIONS, ("ALTER TABLE runs ADD COLUMN mood TEXT",)))
    with closing(RunLog(path)) as log:
        assert [(each["target"], each["mood"]) for each in log.runs()] == [("there", None)]
    monkeypatch.undo()
    with pytest.raises(LogUnusable, match="newer lda"):
        RunLog(path)


def test_a_failed_step_changes_nothing(path, monkeypatch):
    """A step of the schema is done wholly or not at all."""
    with closing(RunLog(path)):
        pass
    steps = ("ALTER TABLE runs ADD COLUMN mood TEXT", "ALTER TABLE nothing ADD COLUMN x TEXT")
    monkeypatch.setattr(_log, "MIGRATIONS", (*_log.MIGRATIONS, steps))
    with pytest.raises(LogUnusable):
        RunLog(path)
    monkeypatch.undo()
    with closing(RunLog(path)) as log:
        log.begin("generate", "there", pb.GenerateLDARequest())
        assert "mood" not in next(log.runs())


def test_export_reads_as_it_prints(path):
    """The runs are read one by one, not all at once."""
    with closing(RunLog(path)) as log:
        for _ in range(3):
            log.begin("generate", "there", pb.GenerateLDARequest())
        rows = log.runs()
        assert next(rows)["id"] == 1
        log.begin("generate", "later", pb.GenerateLDARequest())
        assert log.with_sequences(next(rows))["id"] == 2
    assert os.path.getsize(path)
