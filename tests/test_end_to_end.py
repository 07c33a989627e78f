"""The whole path as a user has it: `lda-service serve` in its own process, a real pair, the real clients and `lda`."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import grpc
import lda_client
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lda_client import AsyncLdaClient, LdaClient, pb
from lda_client._cli import lda
from tiny_models import byte_tokenizer, save_model

from lda_service import LDAModelPair
from lda_service.engine.request import Branch, Role, Sampling, Stopping
from lda_service.errors import PromptUnusable

WAIT_S = 60
TOKENIZER = byte_tokenizer()


class ServerProcess:
    """`lda-service serve` as a child process; its output is read line by line as it comes."""

    def __init__(self, *arguments, **environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MODEL_", "PORT", "HOST", "DTYPE", "DEVICE"))}
        command = [sys.executable, "-m", "lda_service", "serve", *arguments]
        self.process = subprocess.Popen(
            command,
            env={**clean, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.seen: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def wait_for(self, pattern):
        """The match of the next line that fits."""
        while (line := self._lines.get(timeout=WAIT_S)) is not None:
            self.seen.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no line {pattern!r} in:\n" + "\n".join(self.seen))

    def end(self):
        """All that is left to read, and the exit code."""
        code = self.process.wait(WAIT_S)
        while (line := self._lines.get(timeout=WAIT_S)) is not None:
            self.seen.append(line)
        return code, "\n".join(self.seen)


@contextmanager
def serve(*arguments, **environment):
    """A server that is ready; yields it with `target` and `worker_pid` set."""
    server = ServerProcess("--port", "0", *arguments, **environment)
    try:
        server.target = server.wait_for(r"listening on (\S+)")[1]
        server.worker_pid = int(server.wait_for(r"worker (\d+) started")[1])
        server.wait_for(r"^ready: ")
        yield server
    finally:
        server.process.kill()
        server.process.wait(WAIT_S)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "my-after", "olmo2", seed=1)
    save_model(folder / "my-before", "olmo2", seed=2)
    return folder


@pytest.fixture(scope="module")
def models(folders):
    return {"MODEL_AFTER_ID": str(folders / "my-after"), "MODEL_BEFORE_ID": str(folders / "my-before")}


@pytest.fixture(scope="module")
def server(models):
    with serve("--max-running-sequences", "8", **models) as server:
        yield server


@pytest.fixture
def client(server):
    with LdaClient(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def library(models):
    return LDAModelPair(models["MODEL_AFTER_ID"], models["MODEL_BEFORE_ID"], device="cpu")


def test_the_stream_equals_the_library(client, library):
    """Tokens, text, logprobs and ends over gRPC are those of the engine in this process, at the same seed."""
    streamed = client.complete("Hello there", alpha=2.0, num_sequences=3, seed=11, max_new_tokens=20)
    sampling, stopping = Sampling(0.8, 0.95, seed=11), Stopping(20)
    local = library.rollouts("Hello there", [Branch(Role.AMPLIFIED, 2.0)], 3, sampling, stopping)
    for ours, theirs in zip(streamed, local, strict=True):
        assert ours.text == theirs.completion
        assert [token.id for token in ours.tokens] == [token.token_id for token in theirs.tokens]
        assert [token.logprob for token in ours.tokens] == pytest.approx([t.logprob for t in theirs.tokens], abs=1e-4)
        assert ours.reason_name == theirs.finish_reason.name
        assert "Hello there" not in ours.text


def test_text_arrives_in_whole_characters(client):
    """Bytes of random models rarely spell characters; what arrives is valid all the same, and whole."""
    for completion in client.complete(
        "\u6708\U0001f319", raw=True, num_sequences=8, temperature=2.0, top_p=1.0, seed=2
    ):
        ids = [token.id for token in completion.tokens]
        assert completion.text == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_both_models_side_by_side(client, library):
    """GenerateBoth streams each model's own rollouts, on the same noise as the library."""
    with client.generate_both("Hello", seed=3, max_new_tokens=10) as stream:
        completions = stream.gather()
    local = {c.role: c for c in library.generate_both("Hello", 1, Sampling(seed=3), Stopping(10))}
    assert {c.role: c.text for c in completions} == {
        pb.MODEL_ROLE_AFTER: local[Role.AFTER].completion,
        pb.MODEL_ROLE_BEFORE: local[Role.BEFORE].completion,
    }


def test_score(client, library):
    """Scored positions over gRPC equal the library's, and the total at each alpha is there."""
    scored = client.score("Hello", " world", alpha=0.5, score_alphas=[0.0, 0.5], top_candidates=2).gather()
    local = library.score("Hello", " world", alpha=0.5, score_alphas=[0.0, 0.5], top_candidates=2)
    assert [t.id for t in scored.tokens] == [t.token_id for t in local.tokens]
    assert scored.alpha_scores == pytest.approx(local.alpha_scores, abs=1e-3)
    for ours, theirs in zip(scored.tokens, local.tokens, strict=True):
        assert ours.diagnostics.before_logprob == pytest.approx(theirs.diagnostics.before_logprob, abs=1e-4)
        assert ours.diagnostics.critical_piece == theirs.diagnostics.critical_piece


def test_description_names_models_without_the_servers_paths(client, folders):
    """Clients learn a folder's own name, not where it lies."""
    pair = client.model_pair()
    assert (pair.after.model_id, pair.before.model_id) == ("my-after", "my-before")
    assert str(folders) not in str(pair)
    assert pair.has_chat_template
    assert pair.defaults.alpha == 1.0
    report = client.tokenizer_compat()
    assert report.compatible
    assert report.after_padded_row_count == 288 - 260


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"prompt": ""}, lda_client.ValidationFailed, "prompt"),
        ({"prompt": "x", "alpha": float("nan")}, lda_client.ValidationFailed, "alpha"),
        ({"prompt": "x", "top_p": 0.0}, lda_client.ValidationFailed, "top_p"),
        ({"prompt": "x" * 200}, lda_client.ContextExceeded, "128"),
        ({"prompt": [1, 2, 275]}, lda_client.PromptUnusable, "275"),
        ({"prompt": "x", "max_new_tokens": 100_000}, lda_client.LimitExceeded, "max_new_tokens"),
    ],
)
def test_bad_input_is_named_with_its_remedy(client, arguments, error, words):
    """Each mistake comes back as its own error, before any work, with a sentence that names what to change."""
    with pytest.raises(error) as caught:
        client.complete(raw=True, **arguments) if isinstance(arguments["prompt"], str) else client.complete(**arguments)
    assert words in caught.value.message
    assert caught.value.reason


async def test_leaving_early_cancels_on_the_server(server):
    """Leaving `async with` ends the generation on the server; the log says so."""
    async with AsyncLdaClient(server.target) as client:
        async with client.generate("Hi", num_sequences=100, max_new_tokens=100, ignore_eos=True) as stream:
            async for _ in stream:
                if stream.started:
                    break
            name = stream.generation_id
        await asyncio.to_thread(server.wait_for, rf"generation {name} cancelled")


def test_the_command_line(server):
    """`lda generate`, `both`, `score`, `compat` and `info` work against the real server."""
    run = lambda *arguments: CliRunner().invoke(lda, [*arguments, "--target", server.target], catch_exceptions=False)
    texts = {run("generate", "Hi", "--alpha", "1", "--seed", "4", "--max-new-tokens", "12").stdout for _ in range(2)}
    assert len(texts) == 1
    for arguments in (["both", "Hi"], ["score", "Hi", " you"], ["compat"], ["info"]):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout


def test_an_empty_prompt_is_no_prompt(client, library):
    """A plain empty prompt is refused, though the chat template would make tokens of it; so it is by the library."""
    with pytest.raises(lda_client.PromptUnusable, match="empty"):
        client.complete("")
    with pytest.raises(PromptUnusable, match="empty"):
        library.generate_lda(prompt="")


def test_worker_kill_minus_9(models):
    """Open streams end with WORKER_DIED at once, health turns, a fresh worker serves again, and the stream's text was
    no more than what the library would say.
    """
    with serve(**models) as server, LdaClient(server.target) as client:
        stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(server.target))
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="lda.v1.LdaService"), timeout=WAIT_S)
        states = (reply.status for reply in watch)
        assert next(states) == health_pb2.HealthCheckResponse.SERVING
        stream = client.generate("Hi", num_sequences=500, max_new_tokens=100, ignore_eos=True)
        for event in stream:
            if event.HasField("delta"):
                os.kill(server.worker_pid, signal.SIGKILL)
                break
        with pytest.raises(lda_client.WorkerDied):
            for _ in stream:
                pass
        assert next(states) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert next(states) == health_pb2.HealthCheckResponse.SERVING
        assert client.complete("Hi", seed=1, max_new_tokens=5)


def test_sigterm_lets_running_streams_end(models):
    """On SIGTERM a running stream comes to its regular end, then the server exits with 0, worker and all."""
    with serve(**models) as server, LdaClient(server.target) as client:
        stream = client.generate("Hi", num_sequences=64, max_new_tokens=60, ignore_eos=True)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        finished = [event for event in stream if event.HasField("finished")]
        assert len(finished) == 64
        code, _ = server.end()
        assert code == 0
        with pytest.raises(ProcessLookupError):
            os.kill(server.worker_pid, 0)


class TestStartUpErrors:
    """A server that cannot start says why and what to do, and exits with 1."""

    def failed(self, *arguments, **environment):
        code, text = ServerProcess(*arguments, **environment).end()
        assert code == 1
        assert "Traceback" not in text
        return text

    def test_missing_model(self, models):
        text = self.failed("--port", "0", **{**models, "MODEL_AFTER_ID": "/nowhere/at-all"})
        assert "/nowhere/at-all" in text
        assert "name a local folder" in text

    def test_only_one_model(self, models):
        text = self.failed("--port", "0", MODEL_AFTER_ID=models["MODEL_AFTER_ID"])
        assert "set MODEL_BEFORE_ID too" in text

    def test_port_in_use(self, models):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            text = self.failed("--port", str(taken.getsockname()[1]), **models)
        assert "Another process listens" in text

    def test_incompatible_pair(self, models, tmp_path):
        other = byte_tokenizer()
        text = other.backend_tokenizer.to_str().replace('"A":', '"@@":', 1).replace('"B":', '"A":', 1)
        swapped = type(other)(tokenizer_object=type(other.backend_tokenizer).from_str(text), eos_token="<|end|>")
        save_model(tmp_path / "swapped", tokenizer=swapped)
        said = self.failed("--port", "0", **{**models, "MODEL_BEFORE_ID": str(tmp_path / "swapped")})
        assert "--allow-incompatible" in said
