"""The README's section "Over HTTP", run as it stands against `lda-service gateway` and the bundled pair."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import pytest_asyncio
from mesh_harness import ROOT, WAIT_S

SECTION = (ROOT / "README.md").read_text().partition("## Over HTTP\n")[2].partition("\n## ")[0]
LINES = re.findall(r"^    (curl .*)$", SECTION, re.MULTILINE)
START_S = 120.0

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine"),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def address():
    """Of a gateway that is ready."""
    settings = ("MODEL_AFTER_ID", "MODEL_BEFORE_ID", "HOST", "PORT", "HTTP_HOST")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lda_service", "gateway", "--port", "0", "--device", "cpu"),
        env={**environment, "HTTP_PORT": "0", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )
    found = ""
    async with asyncio.timeout(START_S):
        while not (line := (await process.stdout.readline()).decode()).startswith("ready"):
            assert line, "the gateway ended before it was ready"
            found = line.removeprefix("http on http://").strip() if line.startswith("http on") else found
    yield found
    process.terminate()
    async with asyncio.timeout(WAIT_S):
        assert await process.wait() == 0


def parsed(text):
    """Every JSON object of an answer: one, one per line, or one per event."""
    lines = (line.removeprefix("data: ") for line in text.splitlines())
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize("line", LINES)
async def test_every_curl_line_of_the_readme_works(address, line):
    """Each line answers with JSON and no error, and each stream with all the `finished` it promised."""
    command = line.replace("curl ", "curl -sS --fail-with-body ", 1).replace("127.0.0.1:8000", address)
    process = await asyncio.create_subprocess_shell(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = await asyncio.wait_for(process.communicate(), START_S)
    assert (process.returncode, errors) == (0, b""), out
    answers = parsed(out.decode())
    if "started" not in answers[0]:
        assert len(answers) == 1
        return
    finished = [each for each in answers if "finished" in each]
    assert len(finished) == answers[0]["started"]["sequence_count"]


async def test_the_readme_shows_every_path_of_the_earlier_api():
    """The section has a line for each endpoint of the earlier server, and for both forms of a stream."""
    paths = {re.search(r"8000(/\S+)", line)[1] for line in LINES}
    assert paths >= {"/generate_lda", "/generate_lda_batch", "/generate", "/tokenizer_compatibility", "/v1:generateLda"}
    assert any("text/event-stream" in line for line in LINES)
