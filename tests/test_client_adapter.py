"""The adapter of the conformance tests: what the protocol asks for, through both clients."""

import json
import subprocess
import sys
from pathlib import Path

import lda_client
import pytest
from lda_client import QueueFull, pb
from lda_client.testing import FakeServer, delta, finished, started

ADAPTER = Path(lda_client.__file__).parents[1] / "conformance" / "adapter.py"
PROMPT = {"prompt": {"text": "hi"}}


@pytest.fixture(params=[[], ["--async"]], ids=["sync", "async"])
def ask(request):
    """Give the adapter calls; what it answers."""

    def ask(*calls):
        command = [sys.executable, str(ADAPTER), *request.param]
        lines = "".join(json.dumps({"id": f"call-{index}", **call}) + "\n" for index, call in enumerate(calls))
        result = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        answers = [json.loads(line) for line in result.stdout.splitlines()]
        assert [answer.pop("id") for answer in answers] == [f"call-{index}" for index in range(len(calls))]
        return answers

    return ask


def test_the_adapter_reports_what_came(ask):
    """Events, results, leaving and refusals come out in the words of the protocol, in the order of the calls."""

    def answer(request):
        if request.prompt.text == "full":
            return QueueFull("Full.", metadata={"depth": "4"}, retry_after_s=2)
        return ["x", "y"]

    with FakeServer(answer) as server:
        known = {"target": server.target}
        answers = ask(
            {**known, "verb": "generate", "request": PROMPT},
            {**known, "verb": "generateBoth", "request": PROMPT, "cancelAfter": 2},
            {**known, "verb": "score", "request": {**PROMPT, "continuation": {"text": "xy"}}, "timeoutMs": 30_000},
            {**known, "verb": "complete", "request": {**PROMPT, "stopping": {"maxNewTokens": 2}}, "token": "secret"},
            {**known, "verb": "generate", "request": {"prompt": {"text": "full"}}},
            {**known, "verb": "modelPair"},
            {**known, "verb": "tokenizerCompat"},
            {**known, "verb": "nothing"},
        )
        calls = server.calls
    generated, both, scored, completed, refused, pair, compat, unknown = answers
    assert [next(iter(event)) for event in generated["events"]] == ["started", "delta", "delta", "finished"]
    assert generated["events"][1] == {
        "delta": {"role": "MODEL_ROLE_AMPLIFIED", "text": "x", "tokens": [{"piece": "eA=="}]}
    }
    assert (generated["ended"], generated["result"], generated["error"]) == ("ok", None, None)
    assert (both["ended"], len(both["events"])) == ("cancelled", 2)
    assert [event["totalTokenCount"] for event in scored["events"]] == [2, 2]
    assert completed["events"] == []
    assert completed["result"] == [
        {
            "sequenceIndex": 0,
            "role": "MODEL_ROLE_AMPLIFIED",
            "text": "xy",
            "tokenIds": [0, 0],
            "reason": "FINISH_REASON_EOS",
            "stopString": "",
            "seed": "7",
        }
    ]
    assert (refused["ended"], refused["events"]) == ("error", [])
    assert refused["error"] == {
        "class": "QueueFull",
        "code": "RESOURCE_EXHAUSTED",
        "reason": "QUEUE_FULL",
        "message": "Full.",
        "metadata": {"depth": "4"},
        "violations": [],
        "retryAfterS": 2.0,
    }
    assert pair["result"]["pairFingerprint"] == "fake-pair"
    assert compat["result"]["compatible"]
    assert "unsupported" in unknown
    assert calls[0].request == pb.GenerateLDARequest(prompt=pb.Prompt(text="hi"))
    assert calls[0].deadline_s is None
    assert 0 < calls[2].deadline_s < 60
    assert calls[3].metadata["authorization"] == "Bearer secret"


def test_the_adapter_reports_completions_as_they_finished(ask):
    """Completions are in the order of `finished`; a value that only a newer contract knows is a number."""
    script = [
        started(seed=2**63),
        delta("b", 1),
        finished(1, reason=pb.FINISH_REASON_STOP, stop_string="END"),
        delta("a"),
        finished(reason=99),
    ]
    with FakeServer(script) as server:
        request = {**PROMPT, "numSequences": 2}
        [answer] = ask({"target": server.target, "verb": "complete", "request": request})
    found = [(each["sequenceIndex"], each["reason"], each["stopString"]) for each in answer["result"]]
    assert found == [(1, "FINISH_REASON_STOP", "END"), (0, 99, "")]
    assert answer["result"][0]["seed"] == str(2**63)


def test_a_broken_stream_has_no_code(ask):
    """An error that no status made has its class and null for the rest."""
    with FakeServer([started()]) as server:
        [answer] = ask({"target": server.target, "verb": "complete", "request": PROMPT})
    assert (answer["ended"], answer["result"]) == ("error", None)
    error = answer["error"]
    assert (error["class"], error["code"], error["reason"]) == ("StreamBroken", None, None)
