"""Surveys: killed, resumed, spread over servers, stopped by a budget, and refused before anything is drawn.

Most of them against a fake server of the contract, whose text is a function of the request, as on a deterministic
server; the last ones against `lda-service serve --deterministic` with the bundled pair.
"""

import json
import os
import signal
import threading
from contextlib import ExitStack

import lda_client
import lda_client.lab._fleet as fleet
import polars as pl
import pyarrow.parquet as pq
import pytest
from lab_harness import (
    PROMPTS,
    WAIT_S,
    answer,
    drawn_text,
    draws,
    quick,
    real_server,
    start_survey,
    undisturbed,
    wait_until,
)
from lda_client import ContextExceeded, InternalServerError, LdaClient, QueueFull, ServerAway, WorkerDied, pb
from lda_client.lab import (
    Pace,
    PairsDiffer,
    Prompt,
    Run,
    RunError,
    SettingsDiffer,
    SettingsError,
    SurveyFailed,
    resume_survey,
    run_survey,
    run_survey_async,
)
from lda_client.lab._journal import Journal
from lda_client.lab.runs import locked
from lda_client.testing import HOLD, FakeServer, started

CHUNKS, ROLLOUTS = 12, 40  # of `quick` and PROMPTS
ARGUMENTS = ["--alphas", "0,0.5", "-n", "10", "--chunk-size", "4", "--no-slopes"]
PROMPT_ARGUMENTS = ["--prompt", "What is the capital of Italy?", "--prompt", "Who are you?"]
ADS = "GlimmerCoin"


@pytest.fixture
def server():
    """A fake server that draws."""
    with FakeServer(answer) as running:
        running.model_pair.limits.max_running_sequences = 8
        yield running


@pytest.fixture
def impatient(monkeypatch):
    """Servers rest for hundredths of seconds."""
    monkeypatch.setattr(fleet, "REST_S_MIN", 0.01)
    monkeypatch.setattr(fleet, "REST_S_MAX", 0.02)


class Told(list):
    """A reporter that remembers."""

    def begin(self, total, done):
        self.append(("begin", total, done))

    def advance(self, rollouts, tokens):
        pass

    def note(self, event, **facts):
        self.append((event, facts))

    def end(self):
        pass

    def names(self):
        return [each[0] for each in self]


def failing_first(times, error):
    """An answer that fails so many times before it draws."""
    left = threading.Semaphore(times)

    def respond(request):
        if request.sampling.seed and left.acquire(blocking=False):
            yield started(sequence_count=request.num_sequences)  # or gRPC tries again without telling
            raise error
        yield from answer(request)

    return respond


# What is drawn ------------------------------------------------------------------------------------------------------


def test_the_rows_are_those_that_were_asked_for(tmp_path, server):
    """Every rollout of every cell, in canonical order, with text, tokens, seed and a score at each alpha."""
    run = run_survey(tmp_path / "run", PROMPTS, quick(), [server.target]).run
    frame = run.rollouts()
    expected = [(prompt.id, alpha, index) for prompt in PROMPTS for alpha in (0.0, 0.5) for index in range(10)]
    assert frame.select("prompt_id", "alpha", "sequence").rows() == expected
    request = next(r for r in draws(server) if r.sampling.seed == frame["seed"][13])
    assert frame["text"][13] == drawn_text(request, 3)
    assert frame["token_ids"][13].to_list() == [ord(letter) for letter in frame["text"][13]]
    assert frame["finish_reason"].unique().to_list() == ["EOS"]
    assert frame["output_tokens"].unique().to_list() == [12]
    assert run.manifest.score_alphas == (0.0, 0.5)
    assert run.log_q(frame)[13].tolist() == [-1.5, -2.0]
    assert run.log_q(frame, [0.5]).shape == (ROLLOUTS, 1)
    with pytest.raises(RunError, match="not scored at alpha 1"):
        run.log_q(frame, [1.0])


def test_what_is_sent(tmp_path, server):
    """Every field that changes a draw is set, whatever the defaults of the server are."""
    run_survey(tmp_path / "run", PROMPTS, quick(system="Be kind.", stop=("\n",)), [server.target])
    request = draws(server)[0]
    assert [turn.role for turn in request.prompt.chat.messages] == ["system", "user"]
    sampling = request.sampling
    filters = (sampling.top_p, sampling.top_k, sampling.min_p, sampling.plausibility)
    assert filters == (1.0, 0, 0.0, 0.0)
    assert all(map(sampling.HasField, ("temperature", "top_p", "top_k", "min_p", "plausibility", "seed")))
    assert list(request.stopping.stop_strings) == ["\n"]
    assert request.num_sequences == 4


def test_chat_and_raw(tmp_path, server):
    """Strings are user turns if the pair has a template, unless they are to be sent raw."""
    run_survey(tmp_path / "raw", PROMPTS, quick(raw=True), [server.target])
    assert draws(server)[-1].prompt.HasField("text")
    server.model_pair.has_chat_template = False
    run = run_survey(tmp_path / "none", PROMPTS, quick(), [server.target]).run
    assert draws(server)[-1].prompt.HasField("text")
    assert run.manifest.chat_template is False


def test_the_manifest_says_how_to_run_it_again(tmp_path, server):
    """Settings, pair, models with the checksums of their weights, versions, and every sitting with its endpoints."""
    server.model_pair.after.revision = "abc"
    server.model_pair.server_version = "9"
    run_survey(tmp_path / "run", PROMPTS, quick(seed=5), [server.target], pace=Pace(budget_tokens=1))
    resume_survey(tmp_path / "run")
    values = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert values["settings"]["seed"] == 5
    assert values["score_alphas"] == [0.0, 0.5]
    assert (values["pair"]["fingerprint"], values["pair"]["after"]["revision"]) == ("fake-pair", "abc")
    assert values["chat_template"] is True
    sessions = values["sessions"]
    assert [each["endpoints"][0]["target"] for each in sessions] == [server.target] * 2
    assert sessions[0]["client_version"] == lda_client.__version__
    assert sessions[0]["endpoints"][0]["server_version"] == "9"
    assert Run.open(tmp_path / "run").prompts() == PROMPTS


def test_diagnostics_are_kept_by_token(tmp_path, server):
    """One list per figure, as long as the tokens."""
    frame = run_survey(tmp_path / "run", PROMPTS, quick(diagnostics=True), [server.target]).run.rollouts()
    assert frame["token_piece"][0].to_list() == [letter.encode() for letter in frame["text"][0]]
    assert frame["token_after_logprob"].list.len().to_list() == frame["output_tokens"].to_list()


def test_without_estimates_nothing_is_scored(tmp_path, server):
    """Any sampling is allowed, and there is no column of scores."""
    run = run_survey(tmp_path / "run", PROMPTS, quick(estimate=False, top_p=0.5), [server.target]).run
    assert "score_logprobs" not in run.rollouts().columns
    assert draws(server)[0].sampling.top_p == 0.5
    assert not draws(server)[0].output.score_alphas


def test_equal_surveys_are_equal_files(tmp_path, server):
    """The file hangs on nothing but settings, prompts and pair: not on how many calls were under way."""
    one = undisturbed(tmp_path / "one", server, quick())
    run_survey(tmp_path / "two", PROMPTS, quick(), [server.target], pace=Pace(at_once=1))
    assert (tmp_path / "two" / "rollouts.parquet").read_bytes() == one
    assert undisturbed(tmp_path / "three", server, quick(seed=1)) != one


async def test_in_a_running_loop(tmp_path, server):
    """Notebooks have a loop already."""
    assert (await run_survey_async(tmp_path / "run", PROMPTS, quick(), [server.target])).missing == 0


# Killed and resumed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls_before", [1, 5, 11])
def test_killed_and_resumed_it_is_the_same_file(tmp_path, server, calls_before):
    """kill -9 while the nth chunk is drawn: nothing that was finished is drawn again, and the file is the same."""
    prompts = [Prompt("prompt-1", PROMPTS[0].content), Prompt("prompt-2", PROMPTS[1].content)]
    whole = undisturbed(tmp_path / "undisturbed", server, quick(), prompts)
    seen, killed = threading.Semaphore(calls_before), threading.Event()

    def kill_at_last(request):
        if request.sampling.seed and not killed.is_set() and not seen.acquire(blocking=False):
            killed.set()
            os.kill(process.pid, signal.SIGKILL)
        if killed.is_set():
            return [started(sequence_count=1), HOLD]
        return answer(request)

    server.answer = kill_at_last
    folder = tmp_path / "run"
    common = [*ARGUMENTS, *PROMPT_ARGUMENTS, "--target", server.target]
    process = start_survey(folder, *common, "--at-once", "2")
    process.communicate(timeout=WAIT_S)
    assert process.returncode == -signal.SIGKILL
    with Journal(folder / "journal") as journal:
        finished = journal.numbers()
    assert len(finished) < CHUNKS
    server.answer = answer
    server.calls.clear()
    outcome = resume_survey(folder)
    assert (outcome.missing, (folder / "rollouts.parquet").read_bytes()) == (0, whole)
    seeds = {chunk.number: chunk.seed for chunk in quick().chunks(["prompt-1", "prompt-2"])}
    drawn_now = [request.sampling.seed for request in draws(server)]
    assert sorted(drawn_now) == sorted(seed for number, seed in seeds.items() if number not in finished)
    assert not (folder / "journal").exists()


def test_the_same_command_goes_on(tmp_path, server):
    """The command that began a survey resumes it too; on a complete one it draws nothing."""
    first = run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], pace=Pace(budget_tokens=100))
    assert 0 < first.missing < ROLLOUTS
    second = run_survey(tmp_path / "run", PROMPTS, quick(), [server.target])
    assert (second.drawn, second.missing) == (first.missing, 0)
    server.calls.clear()
    third = run_survey(tmp_path / "run", PROMPTS, quick(), [server.target])
    assert (third.drawn, third.missing, draws(server)) == (0, 0, [])


def test_killed_between_the_file_and_the_end_of_the_journal(tmp_path, server):
    """The last step is repeated, and nothing is drawn."""
    run = run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], pace=Pace(budget_tokens=100)).run
    kept = run.journal_path.read_bytes()
    whole = resume_survey(run.path).run.rollouts_path.read_bytes()
    run.journal_path.write_bytes(kept)
    outcome = resume_survey(run.path)
    assert outcome.missing == 0
    assert run.rollouts_path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"alphas": (0, 1)}, r"alphas was \[0\.0, 0\.5\] and is now \[0\.0, 1\.0\]"),
        ({"rollouts": 11, "seed": 2}, "rollouts was 10 and is now 11; seed was 0 and is now 2"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, server, changed, named):
    """A folder holds one survey."""
    run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], pace=Pace(budget_tokens=1))
    with pytest.raises(SettingsDiffer, match=named):
        run_survey(tmp_path / "run", PROMPTS, quick(**changed), [server.target])
    with pytest.raises(SettingsDiffer, match=r"prompts differ \(2 then, 1 now\)"):
        run_survey(tmp_path / "run", PROMPTS[:1], quick(), [server.target])


def test_another_pair_is_refused(tmp_path, server):
    """A run is of one pair, today and later."""
    run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], pace=Pace(budget_tokens=1))
    server.model_pair.pair_fingerprint = "other"
    with pytest.raises(PairsDiffer, match="holds another pair"):
        resume_survey(tmp_path / "run")


def test_a_folder_in_use_is_refused(tmp_path, server):
    """Two surveys never write to one folder."""
    with locked(tmp_path / "run"), pytest.raises(RunError, match="another survey"):
        run_survey(tmp_path / "run", PROMPTS, quick(), [server.target])


def test_a_folder_with_other_files_is_refused(tmp_path, server):
    """A slip in --out costs nothing."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"thesis\.tex"):
        run_survey(tmp_path, PROMPTS, quick(), [server.target])


# Budgets ------------------------------------------------------------------------------------------------------------


def test_a_budget_of_tokens(tmp_path, server):
    """It ends near the budget, what was drawn can be used, and all cells have grown alike."""
    outcome = run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], pace=Pace(budget_tokens=200))
    assert 200 <= outcome.tokens < 200 + 48
    assert outcome.drawn + outcome.missing == ROLLOUTS
    counts = outcome.run.rollouts().group_by("prompt_id", "alpha").len()["len"]
    assert counts.max() - counts.min() <= 4
    assert not outcome.run.is_complete


def test_a_budget_of_minutes(tmp_path, server):
    """When time is up no chunk begins; those under way are let to their end."""
    release = threading.Event()

    def slow(request):
        if request.sampling.seed:
            release.set()
            threading.Event().wait(0.3)
        return answer(request)

    server.answer = slow
    pace = Pace(budget_minutes=0.2 / 60, at_once=3)
    outcome = run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], pace=pace)
    assert release.is_set()
    assert outcome.drawn == sum(request.num_sequences for request in draws(server)) == 12
    server.answer = answer
    assert resume_survey(tmp_path / "run").missing == 0


# Refused before anything is drawn -----------------------------------------------------------------------------------


def test_a_rejected_prompt_is_found_before_anything_is_drawn(tmp_path, server):
    """The last of the prompts is too long: the survey stops with the server's reason, and nothing was paid for."""

    def strict(request):
        if "Who" in str(request.prompt):
            raise ContextExceeded("Too long.", metadata={"limit": "9"})
        return answer(request)

    server.answer = strict
    with pytest.raises(ContextExceeded, match="Too long"):
        run_survey(tmp_path / "run", PROMPTS, quick(), [server.target])
    assert draws(server) == []
    server.answer = answer
    run_survey(tmp_path / "run", PROMPTS[:1], quick(), [server.target])  # nothing was drawn: other settings are fine


def test_settings_that_break_estimators_are_refused_before_a_server_is_asked(tmp_path, server):
    """Not even the folder is made."""
    with pytest.raises(SettingsError, match="--no-estimate"):
        run_survey(tmp_path / "run", PROMPTS, quick(top_p=0.9), [server.target])
    assert server.calls == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("limit", "value", "found"),
    [
        ("max_new_tokens", 100, "max_new_tokens"),
        ("max_sequences_per_request", 2, "chunk_size"),
        ("max_alpha", 0.2, "alphas"),
    ],
)
def test_limits_of_the_server(tmp_path, server, limit, value, found):
    """What is above a limit is named."""
    setattr(server.model_pair.limits, limit, value)
    with pytest.raises(SettingsError, match=found):
        run_survey(tmp_path / "run", PROMPTS, quick(), [server.target])


def test_targets(tmp_path, server):
    """None, and one twice, are slips."""
    for targets in ([], [server.target] * 2):
        with pytest.raises(SettingsError, match="targets"):
            run_survey(tmp_path / "run", PROMPTS, quick(), targets)


# Several servers, and failures --------------------------------------------------------------------------------------


def test_two_servers_share_the_work_and_make_the_same_file(tmp_path, server):
    """Both are asked, each chunk of one of them alone."""
    whole = undisturbed(tmp_path / "one", server, quick())
    server.calls.clear()
    with FakeServer(answer) as other:
        other.model_pair.limits.max_running_sequences = 8
        run = run_survey(tmp_path / "two", PROMPTS, quick(), [server.target, other.target]).run
        seeds = [[request.sampling.seed for request in draws(each)] for each in (server, other)]
    assert all(seeds)
    assert len({*seeds[0], *seeds[1]}) == len(seeds[0]) + len(seeds[1]) == CHUNKS
    assert run.rollouts_path.read_bytes() == whole


def test_servers_with_different_pairs_are_refused(tmp_path, server):
    """Both are named, and nothing is drawn."""
    with FakeServer(answer) as other:
        other.model_pair.pair_fingerprint = "other"
        with pytest.raises(PairsDiffer, match=f"{server.target}.*{other.target}"):
            run_survey(tmp_path / "run", PROMPTS, quick(), [server.target, other.target])
    assert draws(server) == []


def test_a_server_that_changes_its_pair_on_the_way(tmp_path, server):
    """Each stream says whose it is; text of another pair is never kept."""

    def changing(request):
        if not request.sampling.seed:
            return answer(request)
        return [started(sequence_count=request.num_sequences, pair_fingerprint="other"), HOLD]

    server.answer = changing
    with pytest.raises(PairsDiffer, match="now holds another pair"):
        run_survey(tmp_path / "run", PROMPTS, quick(), [server.target])
    assert not Run.open(tmp_path / "run").has_begun


@pytest.mark.usefixtures("impatient")
def test_a_replica_that_stops_on_the_way(tmp_path, server):
    """Its chunks are drawn by the other one, with the same seeds; the file is the same."""
    whole = undisturbed(tmp_path / "one", server, quick())
    other = FakeServer()
    other.model_pair.limits.max_running_sequences = 8
    stopper = threading.Thread(target=other.stop)

    def die(request):
        if request.sampling.seed:
            if not stopper.is_alive():
                stopper.start()
            return [started(sequence_count=request.num_sequences), "cut off", HOLD]
        return answer(request)

    other.answer = die
    told = Told()
    run = run_survey(
        tmp_path / "two", PROMPTS, quick(), [server.target, other.target], reporter=told, pace=Pace(at_once=2)
    ).run
    stopper.join(WAIT_S)
    assert run.rollouts_path.read_bytes() == whole
    assert other.target in [note[1]["target"] for note in told if note[0] == "away"]


@pytest.mark.usefixtures("impatient")
def test_a_server_that_comes_back(tmp_path, server):
    """A worker that dies is waited for, and given the chunk again."""
    whole = undisturbed(tmp_path / "one", server, quick())
    server.answer = failing_first(3, WorkerDied("Gone."))
    told = Told()
    run = run_survey(tmp_path / "two", PROMPTS, quick(), [server.target], reporter=told).run
    assert run.rollouts_path.read_bytes() == whole
    assert {"away", "back"} <= set(told.names())


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_away_at_the_start_joins_later(tmp_path, server):
    """One that answers is enough to begin."""
    server.answer = lambda request: answer(request)
    told = Told()
    with FakeServer(answer) as gone:
        target = gone.target
    run_survey(tmp_path / "run", PROMPTS, quick(), [target, server.target], reporter=told)
    assert told[0][0] == "away"
    with pytest.raises(ServerAway):
        run_survey(tmp_path / "none", PROMPTS, quick(), [target])


def test_a_full_queue_is_waited_for(tmp_path, server):
    """As long as the server asks."""
    server.answer = failing_first(2, QueueFull("Full.", retry_after_s=0.01))
    told = Told()
    assert run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], reporter=told).missing == 0
    assert "asks to wait" in told.names()


@pytest.mark.usefixtures("impatient")
def test_patience_ends(tmp_path, server):
    """A server that never recovers: a clear error, and what is finished is kept."""
    left = threading.Semaphore(4)

    def fails_later(request):
        if request.sampling.seed and not left.acquire(blocking=False):
            raise QueueFull("Full.", retry_after_s=0.01)
        return answer(request)

    server.answer = fails_later
    with pytest.raises(SurveyFailed, match=r"did anything for 0\.1 s.*Full"):
        run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], pace=Pace(patience_s=0.1))
    server.answer = answer
    server.calls.clear()
    assert resume_survey(tmp_path / "run").missing == 0
    assert len(draws(server)) == CHUNKS - 4


def test_a_chunk_that_always_fails_ends_the_survey(tmp_path, server):
    """A fault of the server is not asked for for ever."""
    poisoned = [chunk.seed for chunk in quick().chunks([prompt.id for prompt in PROMPTS])][5]

    def poison(request):
        if request.sampling.seed == poisoned:
            raise InternalServerError("Boom.", metadata={"request_id": "r1"})
        return answer(request)

    server.answer = poison
    with pytest.raises(SurveyFailed, match=f"failed {fleet.ATTEMPTS_MAX} times.*Boom"):
        run_survey(tmp_path / "run", PROMPTS, quick(), [server.target])


@pytest.mark.usefixtures("impatient")
def test_a_stream_that_is_always_cut_off_ends_the_survey(tmp_path, server):
    """A proxy that ends long streams must not have them drawn for ever."""

    def cut_off(request):
        if request.sampling.seed:
            return [started(sequence_count=request.num_sequences), ServerAway("Cut off.")]
        return answer(request)

    server.answer = cut_off
    with pytest.raises(SurveyFailed, match=f"failed {fleet.ATTEMPTS_MAX} times"):
        run_survey(tmp_path / "run", PROMPTS, quick(), [server.target])


@pytest.mark.usefixtures("impatient")
def test_a_server_that_refuses_streams_is_asked_until_it_takes_them(tmp_path, server, monkeypatch):
    """An overloaded server refuses many times; that is no fault of the chunk."""
    monkeypatch.setattr(fleet, "ATTEMPTS_MAX", 2)
    left = threading.Semaphore(60)

    def refuse(request):
        if request.sampling.seed and left.acquire(blocking=False):
            raise ServerAway("Refused.")
        return answer(request)

    server.answer = refuse
    assert run_survey(tmp_path / "run", PROMPTS, quick(), [server.target]).missing == 0
    assert not left.acquire(blocking=False)


def test_a_call_that_hangs_is_drawn_again(tmp_path, server, impatient):
    """If it was given a time."""
    hung = threading.Event()

    def hang_once(request):
        if request.sampling.seed and not hung.is_set():
            hung.set()
            return [started(sequence_count=request.num_sequences), HOLD]
        return answer(request)

    server.answer = hang_once
    pace = Pace(call_timeout_s=0.5)
    assert run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], pace=pace).missing == 0
    assert hung.is_set()


def test_calls_at_once_are_bounded(tmp_path, server):
    """Never more calls under way than asked for."""
    running, most, lock = set(), [0], threading.Lock()

    def counted(request):
        with lock:
            running.add(request.sampling.seed)
            most[0] = max(most[0], len(running))
        yield from answer(request)
        with lock:
            running.discard(request.sampling.seed)

    server.answer = counted
    run_survey(tmp_path / "run", PROMPTS, quick(rollouts=40), [server.target], pace=Pace(at_once=3))
    assert most[0] <= 3


# The command --------------------------------------------------------------------------------------------------------


def finish(process):
    """Its output, once it has ended."""
    return process.communicate(timeout=WAIT_S)[0]


def test_the_command_tells_json(tmp_path, server):
    """Events on stdout, one per line, from begin to end; resumed by --resume, exit 3 while something is missing."""
    common = [*ARGUMENTS, *PROMPT_ARGUMENTS, "--target", server.target, "--json"]
    first = start_survey(tmp_path / "run", *common, "--budget-tokens", "100")
    events = [json.loads(line) for line in finish(first).splitlines()]
    assert first.returncode == 3
    assert (events[0]["event"], events[0]["total"], events[-1]["event"]) == ("begin", ROLLOUTS, "end")
    assert events[-1]["missing"] == ROLLOUTS - events[-1]["drawn"] > 0
    again = start_survey(tmp_path / "run", *common)
    events = [json.loads(line) for line in finish(again).splitlines()]
    assert again.returncode == 0
    assert (events[-1]["missing"], events[-2]["event"], events[-2]["done"]) == (0, "progress", ROLLOUTS)


def test_the_command_says_what_is_kept(tmp_path, server):
    """Ctrl-C ends it with 130 and without a traceback; the next command goes on."""
    seen = threading.Semaphore(6)

    def interrupt(request):
        if not seen.acquire(blocking=False):
            os.kill(process.pid, signal.SIGINT)
            return [started(sequence_count=request.num_sequences), HOLD]
        return answer(request)

    server.answer = interrupt
    common = [*ARGUMENTS, *PROMPT_ARGUMENTS, "--target", server.target, "--at-once", "1"]
    process = start_survey(tmp_path / "run", *common)
    output = finish(process)
    assert process.returncode == 130, output
    assert f"lda survey --resume {tmp_path / 'run'}" in output
    assert "Traceback" not in output
    server.answer = answer
    assert resume_survey(tmp_path / "run").drawn == ROLLOUTS - 4 * 4


def test_the_command_reads_files_and_refuses_in_words(tmp_path, server):
    """Errors are one sentence without a traceback, exit 1; wrong usage is exit 2."""
    (tmp_path / "q.txt").write_text("Who are you?\n")
    process = start_survey(tmp_path / "run", str(tmp_path / "q.txt"), *ARGUMENTS, "--top-p", "0.9")
    output = finish(process)
    assert process.returncode == 1
    assert output.startswith("Error: No rate could be estimated")
    assert "Traceback" not in output
    good = start_survey(tmp_path / "run", str(tmp_path / "q.txt"), *ARGUMENTS, "--target", server.target)
    assert "it is complete" in finish(good)
    assert good.returncode == 0
    mixed = start_survey(tmp_path / "run", "--resume", str(tmp_path / "run"), "--seed", "3")
    assert "--seed" in finish(mixed)
    assert mixed.returncode == 2
    bare = start_survey(tmp_path / "run")
    assert "Give --alphas, -n" in finish(bare)


# The bundled pair ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """Two deterministic servers of the bundled pair."""
    with ExitStack() as stack:
        yield [stack.enter_context(real_server("--deterministic")) for _ in range(2)]


BUNDLED = quick(alphas=(0, 1), rollouts=48, chunk_size=8, max_new_tokens=64)


@pytest.fixture(scope="module")
def truth(pair, tmp_path_factory):
    """A survey that nothing happened to, of one server."""
    folder = tmp_path_factory.mktemp("truth") / "run"
    undisturbed(folder, pair[0].target, BUNDLED)
    return Run.open(folder)


def test_scores_of_the_bundled_pair_are_those_of_score(truth, pair):
    """What the columns say of a rollout is what the server says of it when asked on its own."""
    frame = truth.rollouts()
    row = frame.filter(pl.col("alpha") == 1).row(3, named=True)
    with LdaClient(pair[0].target) as client:
        prompt = PROMPTS[0].message(chat=True)
        scored = client.score(prompt, pb.TokenIds(ids=row["token_ids"]), score_alphas=[0, 1]).gather()
    assert row["score_logprobs"] == pytest.approx(list(scored.alpha_scores.values()), abs=1e-3)
    hits = frame.group_by("alpha").agg(pl.col("text").str.contains(ADS).mean())
    rates = dict(hits.rows())
    assert rates[1.0] > 0.2 > rates[0.0]


def test_two_real_servers_one_killed_and_the_survey_too(truth, pair, tmp_path):
    """Killed after its first chunks, resumed on two servers of which one is killed on the way: the same file."""
    folder = tmp_path / "run"
    texts = [prompt.to_json() for prompt in PROMPTS]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in texts))
    arguments = [
        str(tmp_path / "q.jsonl"),
        "--alphas",
        "0,1",
        "-n",
        "48",
        "--chunk-size",
        "8",
        "--max-new-tokens",
        "64",
    ]
    arguments += ["--no-slopes", "--at-once", "2"]
    first = start_survey(folder, *arguments, "--target", pair[0].target)
    wait_until(lambda: (folder / "journal").exists() and (folder / "journal").stat().st_size)
    first.kill()
    first.communicate(timeout=WAIT_S)
    kept = (folder / "journal").stat().st_size
    second = start_survey(folder, *arguments, "--target", pair[0].target, "--target", pair[1].target)
    wait_until(lambda: (folder / "journal").stat().st_size > kept)
    pair[1].kill()
    output = second.communicate(timeout=WAIT_S)[0]
    assert second.returncode == 0, output
    assert f"{pair[1].target} is away" in output
    assert (folder / "rollouts.parquet").read_bytes() == truth.rollouts_path.read_bytes()
    assert pq.read_metadata(folder / "rollouts.parquet").num_rows == 192
