"""What the `test_lab_*` files share: servers to survey, surveys as processes that can be killed."""

from __future__ import annotations

import hashlib
import os
import re
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from lda_client import pb
from lda_client.lab import Prompt, SurveySettings, run_survey
from lda_client.testing import delta, finished, started

ROOT = Path(__file__).parent.parent
WAIT_S = 120.0
PROMPTS = [Prompt("rome", "What is the capital of Italy?"), Prompt("who", "Who are you?")]
LDA = [sys.executable, "-m", "lda_client.cli"]


def drawn_text(request, index):
    """What the fake server draws: a function of what was asked, as on a deterministic server."""
    asked = f"{request.prompt} {request.alpha} {request.sampling.seed} {index}"
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def answer(request):
    """The events of a generation on the fake server; a hit of "a0" is one of 16 texts by 3 of its letters."""
    count = request.num_sequences
    yield started(sequence_count=count, seed=request.sampling.seed, alpha=request.alpha)
    for index in range(count):
        text = drawn_text(request, index)
        tokens = [pb.Token(id=ord(letter), piece=letter.encode()) for letter in text]
        yield delta(text, index, tokens=tokens)
        scores = [pb.AlphaScore(alpha=alpha, logprob=-1.5 - alpha) for alpha in request.output.score_alphas]
        usage = pb.Usage(output_token_count=len(tokens))
        yield finished(index, usage=usage, alpha_scores=scores)


def quick(**values):
    """Settings of a small survey: 2 alphas, 3 calls for each cell."""
    return SurveySettings(**{"alphas": (0, 0.5), "rollouts": 10, "chunk_size": 4, "slopes": False, **values})


def draws(server):
    """The generations that a fake server was asked for, without those that only ask whether a prompt is admitted."""
    asked = [request for request in server.requests if isinstance(request, pb.GenerateLDARequest)]
    return [request for request in asked if request.sampling.seed != 0]


def undisturbed(folder, server, settings, prompts=PROMPTS):
    """The bytes of the rollouts of a survey that nothing happened to."""
    outcome = run_survey(folder, prompts, settings, [server.target if hasattr(server, "target") else server])
    assert outcome.missing == 0
    return outcome.run.rollouts_path.read_bytes()


def start_survey(folder, *arguments):
    """`lda survey` as a process."""
    return subprocess.Popen(
        [*LDA, "survey", "--out", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@contextmanager
def real_server(*arguments):
    """`lda-service serve` with the bundled pair; its process, with `target`."""
    command = [sys.executable, "-m", "lda_service", "serve", "--port", "0", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODEL_")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment | {"OMP_NUM_THREADS": "1"}
    ) as process:
        try:
            process.target = _line(process, r"listening on (\S+)")
            _line(process, r"(ready): ")
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=WAIT_S)


def _line(process, pattern):
    """Read the output up to a line that holds this; its first group."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        if select.select([process.stdout], [], [], 1.0)[0]:
            line = process.stdout.readline()
            assert line, "the server ended"
            if found := re.search(pattern, line):
                return found[1]
    raise AssertionError(f"the server did not print {pattern}")


def wait_until(holds):
    """Poll for what a process does to a file."""
    until = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)
