"""The command `lda`: answers on stdout, notes on stderr, exit codes, help with examples."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import click
import lda_client
import pytest
from click.testing import CliRunner
from lda_client import pb
from lda_client._cli import lda
from lda_client._cli._run import interruptible
from lda_client.testing import HOLD, FakeServer, delta, finished, started, token

CLIENT_FOLDER = Path(lda_client.__file__).parents[1]


COMPARED = token(
    " yes",
    before=-2.0,
    amplified_logprob=-0.5,
    after_rank=1,
    before_rank=2,
    amplified_rank=1,
    after_before_kl=0.25,
    novel_mass=0.125,
    critical_alpha=3.5,
    critical_token_id=9,
    critical_piece=b"no",
)


@pytest.fixture
def server():
    """A server that answers as it is told."""
    with FakeServer(["Hel", "lo"]) as running:
        yield running


@pytest.fixture
def run(server):
    """Run the command against that server, with the address from the environment."""
    return partial(CliRunner().invoke, lda, env={"LDA_TARGET": server.target, "LDA_TOKEN": "", "LDA_NO_LOG": "1"})


def test_generate_prints_the_text_alone(server, run):
    """One sequence: its text on stdout, how to repeat it on stderr."""
    result = run(["generate", "Hi", "--alpha", "-1"])
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert result.stderr == "generation fake, seed 7, alpha -1, 2 tokens, EOS\n"
    request = server.requests[-1]
    assert request == pb.GenerateLDARequest(
        alpha=-1, prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]))
    )


def test_generate_several(server, run):
    """Several sequences: each whole under its own header, in the order in which they finish."""
    server.answer = [started(), delta("a"), delta("b", index=1), finished(1), delta("c"), finished()]
    result = run(["generate", "Hi", "--raw", "-n", "2"])
    assert result.stdout.splitlines() == [
        "=== amplified 1: 1 token, EOS ===",
        "b",
        "=== amplified 0: 2 tokens, EOS ===",
        "ac",
    ]


def test_generate_json(run):
    """`--json` prints one object per event, in the contract's names, with every field in its place."""
    result = run(["generate", "Hi", "--raw", "--json"])
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [next(iter(event)) for event in events] == ["started", "delta", "delta", "finished"]
    assert events[1]["delta"]["sequence_index"] == 0
    assert events[3]["finished"]["reason"] == "FINISH_REASON_EOS"
    assert result.stderr == ""


def test_generate_diagnostics(server, run):
    """`--diagnostics` prints a table with one row per token; spaces and half characters show."""
    server.answer = [COMPARED, token(b"\xf0\x9f")]
    result = run(["generate", "Hi", "--raw", "--diagnostics"])
    row = next(line for line in result.stdout.splitlines() if "' yes'" in line)
    assert row.split()[2:] == ["-1.000", "-2.000", "-0.500", "+1.000", "1/2/1", "0.250", "0.125", "3.500", "'no'"]
    assert r"'\xf0\x9f'" in result.stdout
    assert server.requests[-1].output.diagnostics


def test_stdin(server, run):
    """`-` reads the prompt from stdin, without its last line break; only one argument can be `-`."""
    run(["generate", "-", "--raw"], input="two\nlines\n")
    assert server.requests[-1].prompt.text == "two\nlines"
    result = run(["score", "-", "-"], input="x")
    assert result.exit_code == 2


def test_prompt_json(server, run):
    """`--prompt-json` takes a conversation or token ids; what is no JSON is wrong usage."""
    run(["generate", '[{"role": "user", "content": "Hi"}]', "--prompt-json"])
    assert server.requests[-1].prompt.chat.messages[0].content == "Hi"
    run(["generate", "[1, 2]", "--prompt-json"])
    assert list(server.requests[-1].prompt.tokens.ids) == [1, 2]
    for prompt in ("[1,", "7"):
        assert run(["generate", prompt, "--prompt-json"]).exit_code == 2


def test_every_option_reaches_its_field(server, run):
    """Every argument of the verb has an option."""
    options = (
        "--alpha 2 -n 3 --temperature 0.5 --top-p 0.25 --top-k 4 --min-p 0.125 --plausibility 0.0625 --seed 7 "
        "--max-new-tokens 9 --min-new-tokens 1 --ignore-eos --stop A --stop B --stop-token-id 5 --time-budget 1.5 "
        "--diagnostics --top-candidates 2 --max-tokens-per-event 8 --max-event-delay 0.25 --score-alphas=-1,0.5"
    )
    run(["generate", "Hi", "--raw", *options.split()])
    assert server.requests[-1] == pb.GenerateLDARequest(
        prompt=pb.Prompt(text="Hi"),
        alpha=2,
        num_sequences=3,
        sampling=pb.Sampling(temperature=0.5, top_p=0.25, top_k=4, min_p=0.125, plausibility=0.0625, seed=7),
        stopping=pb.Stopping(
            max_new_tokens=9,
            min_new_tokens=1,
            ignore_eos=True,
            stop_strings=["A", "B"],
            stop_token_ids=[5],
            time_budget={"seconds": 1, "nanos": 500_000_000},
        ),
        output=pb.OutputOptions(
            diagnostics=True,
            top_candidates=2,
            max_tokens_per_event=8,
            max_event_delay={"nanos": 250_000_000},
            score_alphas=[-1, 0.5],
        ),
    )
    assert run(["generate", "Hi", "--score-alphas", "a,b"]).exit_code == 2


BOTH = [
    started(),
    delta("yes", role=pb.MODEL_ROLE_AFTER),
    delta("no", role=pb.MODEL_ROLE_BEFORE),
    finished(role=pb.MODEL_ROLE_BEFORE),
    finished(role=pb.MODEL_ROLE_AFTER),
]


def test_both(server, run):
    """In a pipe, the texts of both models come under headers; with `--json`, as events."""
    server.answer = BOTH
    result = run(["both", "Hi"])
    assert result.stdout.splitlines() == [
        "=== before 0: 1 token, EOS ===",
        "no",
        "=== after 0: 1 token, EOS ===",
        "yes",
    ]
    assert len(run(["both", "Hi", "--json"]).stdout.splitlines()) == len(BOTH)


def test_both_side_by_side(server, run, monkeypatch):
    """On a terminal, the texts of both models stand side by side."""
    monkeypatch.setattr(sys.modules["lda_client._cli.both"], "_on_terminal", lambda: True)
    server.answer = BOTH
    result = run(["both", "Hi"])
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["after", "before"] in lines
    assert ["yes", "no"] in lines
    assert result.stderr == "generation fake, seed 7, alpha 1\n"


def test_score(server, run):
    """`score` prints a row per token and the totals."""
    server.answer = [token(" Pa", before=-2), token("ris", before=-2)]
    result = run(["score", "The capital is", " Paris", "--raw", "--score-alphas", "0.1", "--alpha", "3"])
    assert "'ris'" in result.stdout
    for total in (
        r"log p after +-2\.000",
        r"log p before +-4\.000",
        r"difference +\+2\.000",
        r"log q\(0\.1\) +-2\.000",
    ):
        assert re.search(total, result.stdout)
    request = server.requests[-1]
    assert (request.prompt.text, request.continuation.text, request.alpha) == ("The capital is", " Paris", 3)
    assert json.loads(run(["score", "a", "b", "--json"]).stdout.splitlines()[1])["offset"] == 1


def test_compat(server, run):
    """`compat` reports, and its exit code is the verdict."""
    server.tokenizer_compat.verdict = "Every id means the same in both."
    result = run(["compat"])
    assert result.exit_code == 0
    assert "Every id means the same in both." in result.stdout
    server.tokenizer_compat.compatible = False
    server.tokenizer_compat.conflicts.add(piece=b"\xf0x", after_id=3)
    result = run(["compat"])
    assert result.exit_code == 1
    assert r"'\xf0x'" in result.stdout
    result = run(["compat", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["compatible"]) == (1, False)


def test_info(server, run):
    """`info` shows the models, the limits and the defaults, each by the contract's name."""
    server.model_pair.after.model_id = "org/tuned"
    server.model_pair.limits.max_new_tokens = 4096
    server.model_pair.defaults.sampling.temperature = 0.7
    result = run(["info"])
    assert "org/tuned" in result.stdout
    assert re.search(r"limit max_new_tokens +4,096", result.stdout)
    assert re.search(r"default sampling\.temperature +0\.7", result.stdout)
    assert json.loads(run(["info", "--json"]).stdout)["after"]["model_id"] == "org/tuned"


def test_server_away():
    """A server that is away: one sentence with the address and the remedy on stderr, exit 1."""
    with FakeServer() as gone:
        target = gone.target
    result = CliRunner().invoke(lda, ["info", "--target", target])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: No LDA server answers at {target}")
    assert "lda-service serve" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (
            lda_client.ValidationFailed("Bad.", violations=[lda_client.Violation("alpha", "finite")]),
            "Bad.; alpha: finite",
        ),
        (lda_client.ContextExceeded("Too long."), "Too long. `lda info` shows the limits."),
        (lda_client.QueueFull("Full.", retry_after_s=2), "Full. Try again in 2 s."),
        (lda_client.InternalServerError("Oops.", metadata={"request_id": "r-1"}), "Oops. Request id: r-1."),
        (lda_client.NoChatTemplate("None."), "None. Use --raw with a plain prompt."),
    ],
)
def test_refusals(server, run, failure, told):
    """What the server says, and what to do about it, in one line; exit 1."""
    server.answer = failure
    result = run(["generate", "Hi"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {told}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "Hi", "--raw", "--system", "x"],
        ["generate", "Hi", "--seed", "-1"],
        ["generate", "Hi", "--seed", str(2**64)],
        ["generate", "Hi", "--tls-cert", __file__],
        ["generate", "Hi", "--timeout", "0"],
        ["nothing"],
    ],
)
def test_wrong_usage(server, run, arguments):
    """Wrong usage exits with 2 and asks the server for no answer."""
    assert run(arguments).exit_code == 2
    assert not server.calls


def test_timeout(server, run):
    """`--timeout` is the deadline of the call."""
    server.answer = [started(), HOLD]
    result = run(["generate", "Hi", "--timeout", "0.2"])
    assert result.exit_code == 1
    assert "--time-budget" in result.stderr


def command_environment(**extra):
    """The environment of a process that finds the client."""
    path = os.pathsep.join(filter(None, [str(CLIENT_FOLDER), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **extra}


@contextlib.contextmanager
def generating(server, folder):
    """`lda generate` as a process that takes Ctrl-C, once the first letter of its answer has been read."""
    environment = command_environment(LDA_TARGET=server.target, LDA_RUNS_DB=str(folder / "runs.db"), LDA_NO_LOG="")
    command = [sys.executable, "-m", "lda_client.cli", "generate", "Hi"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A process inherits that SIGINT is ignored, as it is where these tests run in the background of a script.
    with signal_handled(), subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.read(1) == b"a"
        yield process
        process.kill()


@contextlib.contextmanager
def signal_handled():
    """SIGINT as in a program started by hand."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupt(server, tmp_path):
    """Ctrl-C cancels the call on the server, says nothing more, and exits with 130."""
    server.answer = ["a", HOLD]
    with generating(server, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")
    assert server.wait_cancelled()


def test_an_interrupt_raises_nothing(server):
    """Where gRPC runs, an exception may be dropped; so Ctrl-C closes the stream instead, and a second one raises."""
    server.answer = ["a", HOLD]

    def read_interrupted(stream):
        with interruptible(stream):
            assert next(stream).HasField("started")
            signal.raise_signal(signal.SIGINT)
            assert len(list(stream)) <= 1
            assert server.wait_cancelled()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    with signal_handled(), lda_client.LdaClient(server.target) as client:
        stream = client.generate("Hi", raw=True)
        with pytest.raises(click.exceptions.Exit) as ended:
            read_interrupted(stream)
        assert ended.value.exit_code == 130
        assert stream.cancelled


def test_an_ignored_interrupt_stays_ignored(server):
    """A command in the background of a script is not ended by a Ctrl-C that is meant for another."""
    with signal_handled(), lda_client.LdaClient(server.target) as client:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruptible(client.generate("Hi", raw=True)) as nothing:
            assert nothing is None
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_reader_that_leaves(server, tmp_path):
    """`lda generate | head` ends quietly and cancels the call."""
    server.answer = [*["a" * 10_000] * 100, HOLD]
    with generating(server, tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert server.wait_cancelled()


def test_without_the_extra(tmp_path):
    """Without click, `lda` says how to install it and exits with 2."""
    (tmp_path / "click.py").write_text("raise ModuleNotFoundError('no click', name='click')")
    environment = command_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "lda_client.cli", "info"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "pip install 'lda-client[cli]'" in result.stderr


HELP_PAGES = [[], *([name] for name in lda.commands), *(["runs", name] for name in lda.commands["runs"].commands)]


@pytest.mark.parametrize("page", HELP_PAGES, ids=" ".join)
def test_help_has_examples(page):
    """Every help page ends with examples, and every example is a call of a command that exists."""
    result = CliRunner().invoke(lda, [*page, "--help"])
    assert result.exit_code == 0
    examples = result.stdout.partition("Examples:\n")[2].strip().splitlines()
    assert examples
    called = {command for line in examples for command in re.findall(r"\blda (\w+)", line)}
    assert called <= set(lda.commands)
    assert not page or page[0] in called
    assert all(isinstance(command, click.Command) and command.short_help for command in lda.commands.values())


def test_version():
    """`lda --version` prints the version of the package."""
    assert lda_client.__version__ in CliRunner().invoke(lda, ["--version"]).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    """`lda completion` prints what the shell evaluates; it asks `lda` in the way that click answers."""
    result = CliRunner().invoke(lda, ["completion", shell])
    assert result.exit_code == 0
    assert f"_LDA_COMPLETE={shell}_complete" in result.stdout


def test_completion(monkeypatch):
    """What the script of a shell asks is answered with the commands, and with the options of a command."""
    command = [sys.executable, "-m", "lda_client.cli"]
    for words, expected in (
        ("lda gen", "plain,generate"),
        ("lda runs --h", "plain,--help"),
        ("lda score --al", "plain,--alpha"),
    ):
        asked = {"_LDA_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        result = subprocess.run(command, env=command_environment(**asked), capture_output=True, text=True, check=False)
        assert expected in result.stdout.splitlines()


EXAMPLES = re.findall(r"```python\n(.*?)```", (CLIENT_FOLDER / "README.md").read_text(), re.DOTALL)


def test_readme_examples(server, monkeypatch, capsys):
    """The examples of the README run in their order; with them, every streaming verb."""
    monkeypatch.setenv("LDA_TARGET", server.target)
    server.answer = lambda request: ["a", "b", "c", HOLD] if endless(request) else ["Hel", "lo"]
    names = {}
    for source in EXAMPLES:
        exec(compile(source, "README.md", "exec"), names)
    kinds = {type(request) for request in server.requests}
    assert kinds >= {pb.GenerateLDARequest, pb.GenerateBothRequest, pb.ScoreRequest}
    [left] = [call for call in server.calls if endless(call.request)]
    assert left.cancelled.wait(10)
    assert "Hello" in capsys.readouterr().out


def endless(request):
    """Whether this is the request of the example that leaves early."""
    return isinstance(request, pb.GenerateLDARequest) and request.stopping.ignore_eos
