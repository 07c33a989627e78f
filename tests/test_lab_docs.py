"""docs/lab.md, run as it stands, in its order, against the bundled pair."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "reliability"))

from live_server import serving

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COMMANDS = re.findall(r"^    (?!pip|lda-service)(\S.*)$", (ROOT / "docs/lab.md").read_text(), re.MULTILINE)
PLAIN_RATE = 0.00105  # of the README's table, from 20,013 rollouts at alpha 0


async def test_every_command_of_the_page_works(tmp_path):
    """From a file of prompts to a rate: each command ends well, and an answer holds the rate that is known."""
    async with serving(tmp_path, "--log-level", "warning") as live:
        environment = os.environ | {"LDA_TARGET": live.target, "PATH": f"{BIN}:{os.environ['PATH']}"}

        def run(command):
            return subprocess.run(
                command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
            )

        for command in COMMANDS:
            ended = await asyncio.to_thread(run, command)
            assert ended.returncode == 0, f"{command}: {ended.stdout} {ended.stderr}"
        asked = await asyncio.to_thread(run, "lda estimate runs/first --judge ad --json")
    answers = {each["method"]: each for each in json.loads(asked.stdout)["estimates"]}
    given = [each for method, each in answers.items() if method != "naive" and each["rate"] is not None]
    assert given, answers
    assert all(each["low"] <= PLAIN_RATE <= each["high"] for each in given)


def test_the_page_has_its_commands():
    """A page whose commands are not found would pass for nothing."""
    assert {command.split()[1] for command in COMMANDS if command.startswith("lda ")} >= {
        *("survey", "judge", "agree", "estimate", "plan", "check", "triggers", "surface", "report", "alpha")
    }
