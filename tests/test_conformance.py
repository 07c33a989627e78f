"""The conformance suite: its cases are sound, its runner cannot be fooled, and the Python client passes.

The other languages need their toolchains: `make test-clients` runs those.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

sys.path.insert(0, str(Path(__file__).parents[1] / "clients/conformance"))
# Last: tools/envoy.py has the name of a package that others need.
sys.path.append(str(Path(__file__).parents[1] / "tools"))

import cases
import readmes
import run
import servers
from adapters import Client, registry

ROOT = Path(__file__).parents[1]
PROMISES = (ROOT / "clients/conformance/README.md").read_text()
ERROR_TYPES = set(re.findall(r"[A-Z]\w+", PROMISES[PROMISES.index("    LdaClientError\n") :]))
CASES = cases.load()
PYTHON = [client for client in registry() if client.name.startswith("python")]

# Reasons that a server cannot be brought to through the verbs of a client; a script sends them.
NOT_PROVOKED = {
    "NO_CHAT_TEMPLATE": "the fake engine and the bundled pair both have a chat template",
    "TOKENIZERS_INCOMPATIBLE": "the server refuses such a pair at its start",
    "SLOW_CONSUMER": "an adapter reads as fast as it can",
    "UNKNOWN_GENERATION": "only the methods of an operator name a generation",
}


def reasons_of(chosen):
    """The reasons that cases expect."""
    return {case.expect.get("error", {}).get("reason") for case in chosen}


def test_cases_are_many_and_name_servers_and_errors_that_exist():
    """A case that names an unknown server or error type would never fail for the right reason."""
    assert len(CASES) >= 50
    assert {case.server for case in CASES} == set(servers.NAMES)
    named = {case.expect["error"]["class"] for case in CASES if "error" in case.expect}
    assert {name for name in named if isinstance(name, str)} <= ERROR_TYPES
    assert {case.verb for case in CASES} == set(cases.REQUESTS)


def test_every_reason_of_the_contract_is_covered():
    """Each is sent by a script, and by the real server too, except for those that it cannot be brought to."""
    contract = {name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert reasons_of(case for case in CASES if case.attempts) >= contract
    assert contract - reasons_of(case for case in CASES if not case.attempts) == set(NOT_PROVOKED)


@pytest.mark.parametrize(
    ("spoilt", "finding"),
    [
        ({"name": "Bad"}, "snake_case"),
        ({"call": {"verb": "generate", "request": {"promt": {}}}}, "promt"),
        ({"expect": {"ended": "error"}}, "an error is expected"),
        ({"expect": {"ended": "ok", "event": []}}, "expect has the fields"),
        ({"script": [{"startd": {}}]}, "scripted server"),
        ({"server": "scripted", "script": [{"startd": {}}]}, "startd"),
        ({"during": "dance"}, "during"),
    ],
)
def test_a_malformed_case_is_named(tmp_path, spoilt, finding):
    """A mistake in a case is found when it is read, not taken for a client's."""
    good = {"name": "good", "promise": "It is.", "server": "echo"}
    good |= {"call": {"verb": "modelPair"}, "expect": {"ended": "ok"}}
    (tmp_path / "one.yaml").write_text(f"- {good | spoilt}")
    with pytest.raises(cases.CaseError, match=finding):
        cases.load(tmp_path)


STARTED = {"started": {"seed": "7", "sequenceCount": 1}}


@pytest.mark.parametrize(
    ("pattern", "events", "finding"),
    [
        ([{"started": {"seed": "7"}}], [STARTED], None),
        ([{"started": {"alpha": None, "promptTokenCount": 0}}], [STARTED], None),
        ([{"started": {"seed": 7}}], [STARTED], "seed"),
        ([{"started": {"alpha": 0}}], [STARTED], "alpha"),
        ([{"started": {"alpha": 0.1}}], [{"started": {"alpha": 0.1000001}}], None),
        ([{"started": {"alpha": 0.1}}], [{"started": {"alpha": 0.10001}}], "alpha"),
        ([{"started": {"alpha": float}}], [{"started": {"alpha": -3}}], None),
        ([{"started": {"alpha": float}}], [{"started": {"alpha": "NaN"}}], "alpha"),
        ([{"started": {"alpha": float}}], [STARTED], "alpha"),
        ([STARTED], [STARTED, {"delta": {}}], "expected 1 elements, got 2"),
        ([STARTED, "..."], [STARTED, {"delta": {}}], None),
        ([STARTED, {"delta": {}}, "..."], [STARTED], "expected 2 elements, got 1"),
        ([STARTED], [{"started": {"seed": "7", "sequence": 1}}], "not of the protocol"),
    ],
)
def test_patterns(pattern, events, finding):
    """What is named must be there and equal, zeros told from what is unset; lists match from end to end."""
    case = cases.Case("a", "b.", "echo", {"verb": "generate"}, {"ended": "ok", "events": pattern})
    found = cases.findings(case, {"id": "a", "ended": "ok", "events": events, "result": None, "error": None})
    assert (finding is None) == (not found)
    assert finding is None or finding in found[0]


@pytest.fixture(scope="module")
def running():
    """Every server that the cases name."""
    with servers.Servers(set(servers.NAMES)) as started:
        yield started


def fake_adapter(folder, body):
    """A client whose adapter answers every call by this code."""
    program = folder / "adapter.py"
    lines = "import json, sys\nfor line in sys.stdin:\n    call = json.loads(line)\n" + textwrap.indent(body, "    ")
    program.write_text(lines)
    return Client("fake", str(folder), ["{python}", str(program)])


LOOKUP = next(case for case in CASES if case.name == "tls_lookup_with_token")
GOOD = {"ended": "ok", "events": [], "result": {"pairFingerprint": "f1"}, "error": None}


def answer(**changes):
    """Code that answers with this, whatever was asked."""
    return f"print(json.dumps({{'id': call['id'], **{GOOD | changes!r}}}), flush=True)"


LIES = {
    "wrong value": (answer(result={"pairFingerprint": "f2"}), "result.pairFingerprint: expected 'f1', got 'f2'"),
    "error hidden": (answer(ended="error"), "ended: expected 'ok', got 'error'"),
    "error invented": (answer(error={"class": "LdaClientError"}), "error: expected None"),
    "unknown field": (answer(result={"pairFingerprint": "f1", "madeUp": 1}), "not of the protocol"),
    "nothing": (answer(result=None), "result: expected"),
    "unsupported": ("print(json.dumps({'id': call['id'], 'unsupported': 'later'}), flush=True)", "unsupported: later"),
    "another call": (answer(id="other"), "it answered 'other' when asked"),
    "no json": ("print('hello', flush=True)", "it printed what is no answer: 'hello"),
    "death": ("sys.exit('out of luck')", "the adapter died; it said on standard error: out of luck"),
}


@pytest.mark.parametrize(("body", "finding"), LIES.values(), ids=LIES)
def test_the_runner_catches(running, tmp_path, body, finding):
    """An adapter that answers wrongly, or not at all, fails; one that is dead fails its remaining cases as well."""
    first, second = run.run_cases([LOOKUP, LOOKUP], fake_adapter(tmp_path, body), running)
    assert finding in first.findings[0]
    assert "died" not in finding or first.findings == second.findings


def test_the_runner_passes_what_is_right(running, tmp_path):
    """The same adapter, telling the truth, passes: the lies above fail for their own reasons."""
    (outcome,) = run.run_cases([LOOKUP], fake_adapter(tmp_path, answer()), running)
    assert outcome.mark == run.PASSED


def test_a_silent_adapter_is_given_up(running, tmp_path, monkeypatch):
    """The wait for an answer is bounded."""
    monkeypatch.setattr(run, "ANSWER_S", 0.3)
    (outcome,) = run.run_cases([LOOKUP], fake_adapter(tmp_path, "pass"), running)
    assert outcome.findings[0].startswith("no answer within 0.3 s")


LEAVES_NOTHING = """
import grpc
from google.protobuf.json_format import MessageToDict
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceStub
stub = LdaServiceStub(grpc.insecure_channel(call["target"]))
stream = stub.GenerateLDA(pb.GenerateLDARequest(prompt=pb.Prompt(text="hold")))
kept = [*globals().get("kept", ()), stream]
events = [MessageToDict(next(stream))]
print(json.dumps({"id": call["id"], "ended": "cancelled", "events": events, "error": None}), flush=True)
"""


def test_a_call_that_was_not_cancelled_is_found(running, tmp_path, monkeypatch):
    """Leaving is looked for on the server, and what was left open disturbs no later case."""
    monkeypatch.setattr(servers, "SETTLE_S", 1.0)
    (case,) = [case for case in CASES if case.name == "leave_after_started"]
    outcomes = run.run_cases([case, case], fake_adapter(tmp_path, LEAVES_NOTHING), running)
    assert ["was not cancelled on the server" in str(each.findings) for each in outcomes] == [True, True]


def test_a_choice_without_cases_is_an_error():
    """Cases that are not for the chosen server are not silently left out."""
    with pytest.raises(SystemExit, match="no case"):
        run.main(["--server", "pair", "--case", "aborted"])


def test_missing_tools_and_builds(running, monkeypatch):
    """A client without its toolchain is left out, or fails if that is asked; one that is not built fails."""
    monkeypatch.delenv("CI", raising=False)
    absent = Client("absent", ".", ["build/adapter"], tools=["no-such-tool"])
    outcomes = run.run_client(absent, [LOOKUP], running, run.parse([]))
    assert run.summary("absent", outcomes) == "absent: SKIPPED, not on the PATH: no-such-tool"
    monkeypatch.setenv("CI", "true")
    assert [each.mark for each in run.run_client(absent, [LOOKUP], running, run.parse([]))] == [run.FAILED]
    (unbuilt,) = run.run_cases([LOOKUP], Client("unbuilt", ".", ["build/adapter"]), running)
    assert "build the client first" in unbuilt.findings[0]


def test_a_sample_must_end_with_ok(running, tmp_path):
    """A sample that fails, or ends without its word, is a failure."""
    for code, mark in (("print('ok')", "ok"), ("print('ok\\nbye')", "FAILED"), ("print('ok'); exit(1)", "FAILED")):
        client = Client("fake", str(tmp_path), [], samples={"basic": ["{python}", "-c", code]})
        assert [outcome.mark for outcome in run.run_samples(client, running.target("echo"))] == [mark]


@pytest.mark.parametrize("client", PYTHON, ids=[client.name for client in PYTHON])
def test_the_python_client_keeps_every_promise(running, client):
    """Every case and every sample, with the sync and with the asyncio client."""
    outcomes = run.run_cases(CASES, client, running) + run.run_samples(client, running.target("pair"))
    failed = {outcome.row: outcome.findings for outcome in outcomes if outcome.findings}
    assert failed == {}


README = "# A\n\n<!-- sample: stream.go section:{section} -->\n\n```go\nstale\n```\n\nB\n"
SAMPLE = """\
func main() {
\t// section:stream
\tfor {
\t\t/* section:inner */
\t\tprint()
\t\t/* endsection:inner */
\t}
\t// endsection:stream
}
"""


@pytest.mark.parametrize(
    ("section", "lines"),
    [("stream", "for {\n\tprint()\n}\n"), ("inner", "print()\n"), ("outer", None)],
)
def test_readmes_are_filled_from_samples(tmp_path, section, lines):
    """A block gets the dedented lines between its markers, without the markers of others; a wrong name is an error."""
    (tmp_path / "stream.go").write_text(SAMPLE)
    readme = tmp_path / "README.md"
    readme.write_text(README.format(section=section))
    if lines is None:
        with pytest.raises(readmes.SampleError, match="section:outer"):
            readmes.filled(readme)
        return
    assert readmes.filled(readme) == README.format(section=section).replace("stale\n", lines)
    readme.write_text(readmes.filled(readme))
    assert readmes.filled(readme) == readme.read_text()


def test_readmes_are_fresh():
    """The examples in the READMEs are those of the samples."""
    checked = subprocess.run([sys.executable, "tools/readmes.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_broken_promise_of_the_last_release_is_found(tmp_path):
    """Adding to the contract is fine, taking a field away is not."""
    for folder in ("proto", "third_party", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    contract = tmp_path / "proto/lda/v1/lda_service.proto"

    def check():
        command = [sys.executable, "tools/contract.py", "check"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    field = "  // Which sequence.\n  uint32 sequence_index = 1;\n"
    contract.write_text(contract.read_text().replace(field, field + "  // New.\n  uint32 added = 99;\n", 1))
    assert check().returncode == 0
    contract.write_text(contract.read_text().replace(field, "", 1))
    broken = check()
    assert broken.returncode == 1
    assert "sequence_index" in broken.stdout
