"""Judges: each kind through `judge_run` or the command, blind to alpha; what was judged once is not asked for again."""

import itertools
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import lda_client.lab._llm_judge as llm
import polars as pl
import pytest
from click.testing import CliRunner
from lab_harness import PROMPTS, answer, quick
from lda_client._cli import lda
from lda_client.lab import JudgeError, Pace, Run, RunError, resume_survey, run_survey
from lda_client.lab._llm_judge import LlmJudge, read_answer
from lda_client.lab.judges import ClassifierJudge, FunctionJudge, HumanJudge, Judge, PatternJudge, Verdict, judge_run
from lda_client.testing import FakeServer, delta, finished, started


@pytest.fixture
def run(tmp_path):
    """A complete run of 40 rollouts."""
    with FakeServer(answer) as server:
        return run_survey(tmp_path / "run", PROMPTS, quick(), [server.target]).run


@pytest.fixture
def repeating(tmp_path):
    """A run whose completions are `yes` and `no`, many times each."""

    def repeat(request):
        yield started(sequence_count=request.num_sequences)
        for index in range(request.num_sequences):
            yield delta(("yes", "no", "no")[(request.sampling.seed + index) % 3], index)
            yield finished(index)

    with FakeServer(repeat) as server:
        return run_survey(tmp_path / "repeating", PROMPTS, quick(estimate=False), [server.target]).run


class Recorder(Judge):
    """Says yes, and remembers what it saw."""

    def __init__(self):
        self.seen = []

    @property
    def description(self):
        return {"kind": "recorder"}

    def judge(self, cases, done):
        self.seen += cases
        return [Verdict(True) for _ in cases]


def test_a_judge_sees_completions_only_and_each_once(repeating):
    """Nothing tells of alpha or prompt; the prompt comes only if it is wanted."""
    recorder = Recorder()
    judge_run(repeating, recorder, "blind")
    assert sorted(recorder.seen) == [("no", None), ("yes", None)]
    seeing = Recorder()
    judge_run(repeating, seeing, "seeing", show_prompt=True)
    assert {case.prompt for case in seeing.seen} == {prompt.content for prompt in PROMPTS}
    assert len(seeing.seen) == 4


def test_the_order_tells_nothing(run):
    """Rollouts of one alpha do not come together."""
    recorder = Recorder()
    frame = judge_run(run, recorder, "order")
    alphas = dict(frame.select("text", "alpha").iter_rows())
    order = [alphas[case.completion] for case in recorder.seen]
    assert 10 < sum(one != two for one, two in itertools.pairwise(order)) < 30


def test_patterns(run):
    """Text and expression; verdicts are kept by rollout with how they were made."""
    frame = judge_run(run, PatternJudge("a0"), "text")
    assert frame["hit"].to_list() == ["a0" in text for text in frame["text"]]
    expression = judge_run(run, PatternJudge("^[a-c].*[0-9]$", is_regex=True), "regex")
    assert expression["hit"].to_list() == frame["text"].str.contains("^[a-c].*[0-9]$").to_list()
    assert run.judges() == ["regex", "text"]
    assert run.judge_of("text") == {"kind": "substring", "pattern": "a0", "shows_prompt": False}
    assert judge_run(run, PatternJudge("."), "dot")["hit"].any() is False


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: PatternJudge("("), None),
        (lambda: PatternJudge("(", is_regex=True), "no regular expression"),
        (lambda: PatternJudge(""), "empty"),
    ],
)
def test_patterns_that_are_none(make, found):
    """A bracket is a text, and no expression."""
    if found is None:
        make()
    else:
        with pytest.raises(JudgeError, match=found):
            make()


def test_a_function_from_the_working_directory(run, tmp_path, monkeypatch):
    """True, false, None and scores; with the prompt as second argument if it is to see it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lab_test_judges.py").write_text(
        "def digit(text): return text[0].isdigit() if text[-1] != 'f' else None\n"
        "def share(text): return sum(map(str.isdigit, text)) / len(text)\n"
        "def asked(text, prompt): return 'Italy' in prompt\n"
        "def wrong(text): return 7\n"
        "def broken(text): raise KeyError(text)\n"
    )
    frame = judge_run(run, FunctionJudge("lab_test_judges:digit"), "digit")
    assert frame["hit"].to_list() == [None if text[-1] == "f" else text[0].isdigit() for text in frame["text"]]
    scored = judge_run(run, FunctionJudge("lab_test_judges:share", threshold=0.7), "share")
    assert (scored["hit"] == (scored["score"] >= 0.7)).all()
    asked = judge_run(run, FunctionJudge("lab_test_judges:asked"), "asked", show_prompt=True)
    assert asked["hit"].to_list() == (asked["prompt_id"] == "rome").to_list()
    for name, found in [("wrong", "gave 7"), ("broken", "KeyError"), ("gone", "cannot be loaded")]:
        with pytest.raises(JudgeError, match=found):
            judge_run(run, FunctionJudge(f"lab_test_judges:{name}"), name)
    with pytest.raises(JudgeError, match="module:function"):
        judge_run(run, FunctionJudge("nothing"), "nothing")


def test_a_classifier_in_a_folder(run, tmp_path):
    """A label's score against a threshold, as transformers itself gives it."""
    folder = tmp_path / "classifier"
    save_classifier(folder)
    frame = judge_run(run, ClassifierJudge(str(folder), "toxic", 0.5), "classifier")
    import transformers

    expected = transformers.pipeline("text-classification", model=str(folder))(frame["text"].to_list(), top_k=None)
    scores = [next(each["score"] for each in entry if each["label"] == "toxic") for entry in expected]
    assert frame["score"].to_list() == pytest.approx(scores, abs=1e-5)
    assert (frame["hit"] == (frame["score"] >= 0.5)).all()
    with pytest.raises(JudgeError, match="labels: fine, toxic"):
        judge_run(run, ClassifierJudge(str(folder), "angry"), "angry")
    with pytest.raises(JudgeError, match="cannot be loaded"):
        judge_run(run, ClassifierJudge(str(tmp_path / "gone"), "toxic"), "gone")


def save_classifier(folder):
    """A classifier with random weights, two labels and a token for each letter."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {letter: place for place, letter in enumerate(["[PAD]", "[UNK]", *"0123456789abcdef"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        id2label={0: "fine", 1: "toxic"},
        label2id={"fine": 0, "toxic": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)


# A language model ---------------------------------------------------------------------------------------------------


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint. `replies` are given first: a status, or a text to answer with."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.replies, self.keys = [], [], []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Says yes to texts that hold `a`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(question)
            server.keys.append(self.headers["Authorization"])
            server.running += 1
            server.most = max(server.most, server.running)
            reply = server.replies.pop(0) if server.replies else None
        text = question["messages"][1]["content"].split("<text>")[1].split("</text>")[0]
        self.reply(reply if reply is not None else "It may be so.\n\n" + ("YES" if "a" in text else "**No.**"), server)

    def reply(self, reply, server):
        status = reply if isinstance(reply, int) else 200
        body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        with server.lock:
            server.running -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Silence."""


@pytest.fixture
def endpoint(monkeypatch):
    """A running endpoint; waits are short."""
    monkeypatch.setattr(llm, "WAIT_S_MIN", 0.001)
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def llm_judge(run, endpoint, **values):
    settings = {"rubric": "It holds an a.", "model": "m", "base_url": endpoint.base_url, "store": run.path / "store"}
    return LlmJudge(**settings | values)


def test_a_language_model_judges_and_is_asked_once(run, endpoint):
    """Rubric and completion are sent, the last line counts, and a second run asks nothing."""
    frame = judge_run(run, llm_judge(run, endpoint, api_key="k", at_once=3), "llm")
    assert frame["hit"].to_list() == ["a" in text for text in frame["text"]]
    assert len(endpoint.asked) == frame["text"].n_unique()
    assert endpoint.most <= 3
    assert set(endpoint.keys) == {"Bearer k"}
    question = endpoint.asked[0]
    assert (question["model"], question["temperature"]) == ("m", 0.0)
    assert "It holds an a." in question["messages"][0]["content"]
    assert not any(prompt.content in json.dumps(endpoint.asked) for prompt in PROMPTS)
    again = judge_run(run, llm_judge(run, endpoint), "again")
    assert again["hit"].to_list() == frame["hit"].to_list()
    assert len(endpoint.asked) == frame["text"].n_unique()


def test_what_changes_a_verdict_is_asked_anew(repeating, endpoint):
    """Another rubric, model or view is another judge."""
    for count, (values, show) in enumerate(
        [({}, False), ({"rubric": "Other."}, False), ({"model": "n"}, False), ({}, True)], 1
    ):
        judge_run(repeating, llm_judge(repeating, endpoint, **values), "llm", show_prompt=show)
        assert len(endpoint.asked) == 2 * count + 2 * show
    assert any(PROMPTS[0].content in json.dumps(question) for question in endpoint.asked)


def test_refusals_that_pass_are_tried_again(repeating, endpoint):
    """429 and 503 are waited for; an answer without a verdict is asked for again, and then is none, and is not kept."""
    endpoint.replies = [429, 503, "Hmm.", "Hmm.", "Hmm."]
    frame = judge_run(repeating, llm_judge(repeating, endpoint, at_once=1), "llm")
    assert frame.filter(pl.col("hit").is_null())["text"].n_unique() == 1
    whole = judge_run(repeating, llm_judge(repeating, endpoint), "llm")
    assert whole["hit"].null_count() == 0


def test_refusals_that_do_not_pass(repeating, endpoint):
    """A wrong key ends the judging in words; what was judged before is kept."""
    endpoint.replies = ["YES", 401]
    with pytest.raises(JudgeError, match="HTTP 401"):
        judge_run(repeating, llm_judge(repeating, endpoint, at_once=1), "llm")
    assert len(endpoint.asked) == 2
    judge_run(repeating, llm_judge(repeating, endpoint), "llm")
    assert len(endpoint.asked) == 3


def test_an_endpoint_that_is_away(repeating, endpoint, monkeypatch):
    """Nobody answers: a few attempts, then a sentence."""
    monkeypatch.setattr(llm, "RETRIES_MAX", 1)
    away = llm_judge(repeating, endpoint, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(JudgeError, match=r"did not answer in 2 attempts.*ConnectError"):
        judge_run(repeating, away, "llm")


@pytest.mark.parametrize(
    ("answer", "hit"),
    [("YES", True), ("no", False), ("Yes, but\nNO.", False), ("**YES**\n\n", True), ("yes and no", None), ("", None)],
)
def test_reading_answers(answer, hit):
    """Only a last line that holds one word counts."""
    assert read_answer(answer) is hit


# A person -----------------------------------------------------------------------------------------------------------


def human(run, keys, **values):
    """A person who presses these keys, and what they were shown."""
    pressed, shown = iter(keys), []

    def ask(case, place, total):
        shown.append(case.completion)
        return next(pressed)

    return HumanJudge(ask, run.path / "store", **values), shown


def test_a_person_stops_and_goes_on(run):
    """Labels are kept at once; the next sitting begins where the last one ended, in the same random order."""
    judge, first = human(run, ["yes", "no", "skip", "stop"])
    frame = judge_run(run, judge, "me")
    labels = dict(frame.select("text", "hit").iter_rows())
    assert [labels[text] for text in first] == [True, False, None, None]
    assert frame["hit"].null_count() == 38
    judge, second = human(run, ["no", "stop"])
    frame = judge_run(run, judge, "me")
    assert second[0] == first[3]
    assert frame["hit"].null_count() == 37
    assert len({*first[:3], *second}) == 5


def test_a_person_takes_back(run):
    """Undo shows the one before again; at the start of a sitting there is nothing to take back."""
    judge, shown = human(run, ["undo", "yes", "no", "undo", "undo", "no", "stop"])
    frame = judge_run(run, judge, "me")
    labels = dict(frame.select("text", "hit").iter_rows())
    assert shown[0] == shown[1] == shown[5]
    assert labels[shown[0]] is False
    assert frame["hit"].null_count() == 39


def test_a_person_is_not_asked_for_the_same_text_twice(repeating):
    """And the labelled rollouts are the first of the order, whatever their texts: a random sample."""
    judge, shown = human(repeating, ["yes", "no"], limit=10)
    frame = judge_run(repeating, judge, "me")
    assert len(shown) == 2
    assert frame["hit"].null_count() == 30


def test_more_rollouts_keep_the_labels_a_random_sample(tmp_path):
    """Labels of a run that was not complete stay; new rollouts are asked for where the order puts them."""
    with FakeServer(answer) as server:
        run = run_survey(tmp_path / "run", PROMPTS, quick(), [server.target], pace=Pace(budget_tokens=200)).run
        few = len(run.rollouts())
        judge, first = human(run, ["yes"] * few)
        judge_run(run, judge, "me")
        resume_survey(run.path)
    with pytest.raises(RunError, match="not of these rollouts"):
        run.judged("me")
    judge, second = human(run, ["no"] * 40)
    frame = judge_run(run, judge, "me")
    assert len(second) == 40 - few
    assert not set(first) & set(second)
    assert frame["hit"].sum() == few


# The command --------------------------------------------------------------------------------------------------------


def invoke(*arguments, **options):
    return CliRunner().invoke(lda, ["judge", *map(str, arguments)], **options)


def test_the_command_prints_rates(run):
    """By alpha with exact intervals; verdicts carry the name, or that of the kind."""
    result = invoke(run.path, "--judge", "substring:a", "--name", "ad")
    assert result.exit_code == 0, result.output
    hits = run.judged("ad").group_by("alpha").agg(pl.col("hit").sum()).sort("alpha")["hit"].to_list()
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("0")]
    assert [(row[0], row[1], int(row[2])) for row in rows] == [("0", "20", hits[0]), ("0.5", "20", hits[1])]
    assert invoke(run.path, "--judge", "regex:^a").exit_code == 0
    assert run.judges() == ["ad", "regex"]


def test_the_command_asks_a_person_by_keys(run):
    """Keys that mean nothing are asked for again; the alpha is not shown."""
    result = invoke(run.path, "--judge", "human", "--limit", 3, "--show-prompt", input="yxns")
    assert result.exit_code == 0, result.output
    assert "[3 of 3]" in result.stdout
    assert "prompt:" in result.stdout
    frame = run.judged("human")
    assert (frame["hit"].sum(), frame["hit"].count()) == (1, 2)


def test_the_command_asks_a_language_model(run, endpoint, tmp_path):
    """The rubric is a file, the endpoint may be in the environment."""
    (tmp_path / "rubric.txt").write_text("It holds an a.")
    spec = f"llm:{tmp_path / 'rubric.txt'}"
    environment = {"OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": "k"}
    result = invoke(run.path, "--judge", spec, "--model", "m", "--default-temperature", env=environment)
    assert result.exit_code == 0, result.output
    assert set(endpoint.keys) == {"Bearer k"}
    assert "temperature" not in endpoint.asked[0]


@pytest.mark.parametrize(
    ("arguments", "code", "found"),
    [
        (["--judge", "magic:x"], 2, "no kind of judge"),
        (["--judge", "llm:gone.txt"], 2, "cannot be read"),
        (["--judge", "classifier:x"], 2, "--label"),
        (["--judge", "regex:("], 1, "no regular expression"),
        (["--judge", "substring:a", "--name", "../a"], 1, "no name for verdicts"),
    ],
)
def test_the_command_refuses_in_words(run, arguments, code, found):
    """One sentence, no traceback."""
    result = invoke(run.path, *arguments)
    assert (result.exit_code, "Traceback" in result.output) == (code, False)
    assert found in result.output


def test_a_folder_that_is_no_run(tmp_path):
    """And one without rollouts."""
    assert "no run folder" in invoke(tmp_path, "--judge", "substring:a").output
    (tmp_path / "manifest.json").write_text("{}")
    assert "cannot be read" in invoke(tmp_path, "--judge", "substring:a").output
    with pytest.raises(RunError, match="no run folder"):
        Run.open(tmp_path / "gone")
