"""The samples of the Python client run as they stand, against `lda-service serve` with the bundled pair."""

import os
import re
import subprocess
import sys
from pathlib import Path

import lda_client
import pytest

FOLDER = Path(lda_client.__file__).parents[1] / "samples"
README = FOLDER.parent / "README.md"
RUN_S = 60


@pytest.fixture(scope="module")
def target():
    """The address of a server of the bundled pair, in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MODEL_", "DTYPE", "DEVICE"))}
    command = [sys.executable, "-m", "lda_service", "serve", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=clean | {"OMP_NUM_THREADS": "1"}, **pipes) as server:
        address = None
        for line in server.stdout:
            if found := re.search(r"listening on (\S+)", line):
                address = found[1]
            if line.startswith("ready: "):
                break
        yield address
        server.terminate()
        server.communicate(timeout=RUN_S)


@pytest.mark.parametrize("name", ["basic", "stream", "alpha_sweep", "cancel"])
def test_a_sample_keeps_its_own_promises(target, name):
    """Each sample asserts what it shows, and says ok as its last word."""
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    environment = os.environ | {"LDA_TARGET": target, "PYTHONPATH": str(FOLDER.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "ok"


def test_the_readme_shows_every_sample():
    """Every sample has a part in the README; that the parts are equal is checked by tools/readmes.py."""
    shown = set(re.findall(r"<!-- sample: samples/(\w+)\.py section:\w+ -->", README.read_text()))
    assert shown == {path.stem for path in FOLDER.glob("*.py")}
