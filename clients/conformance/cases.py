"""The cases: read from `cases/*.yaml`, checked for form, and compared with what an adapter answered.

Knows the contract's messages and the format of cases; nothing of servers and processes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from google.protobuf import json_format
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

FOLDER = Path(__file__).parent / "cases"
REST = "..."  # the last element of a list of patterns: anything may follow
RELATIVE_ERROR_MAX = 1e-5

REQUESTS: dict[str, type[Message]] = {
    "generate": pb.GenerateLDARequest,
    "generateBoth": pb.GenerateBothRequest,
    "score": pb.ScoreRequest,
    "complete": pb.GenerateLDARequest,
    "tokenizerCompat": pb.TokenizerCompatRequest,
    "modelPair": pb.GetModelPairRequest,
}
RESPONSES: dict[str, type[Message]] = {
    "generate": pb.GenerateLDAResponse,
    "generateBoth": pb.GenerateBothResponse,
    "score": pb.ScoreResponse,
    "complete": pb.GenerateLDAResponse,
    "tokenizerCompat": pb.TokenizerCompatResponse,
    "modelPair": pb.GetModelPairResponse,
}
STREAMS = ("generate", "generateBoth", "score")
ERROR_FIELDS = {"class", "code", "reason", "message", "metadata", "violations", "retryAfterS"}
CALL_FIELDS = {"verb", "request", "timeoutMs", "token", "tls", "cancelAfter"}
EXPECT_FIELDS = {"ended", "events", "counts", "texts", "result", "error", "freed"}
BEFORE = ("occupied", "crowded", "draining")
DURING = ("drain", "kill", "abort")


class CaseError(Exception):
    """A case that is not well-formed: names the case and what is wrong with it."""


class _Loader(yaml.SafeLoader):
    """YAML with `!repeat [text or list, times]`, `!matches regular-expression` and `!number`."""


def _repeat(loader: _Loader, node: yaml.SequenceNode) -> Any:
    what, times = loader.construct_sequence(node, deep=True)
    return what * times


def _matches(loader: _Loader, node: yaml.ScalarNode) -> re.Pattern[str]:
    return re.compile(str(loader.construct_scalar(node)))


def _number(loader: _Loader, node: yaml.Node) -> type[float]:
    return float  # as a pattern: any finite number, which JSON has without quotes


_Loader.add_constructor("!repeat", _repeat)
_Loader.add_constructor("!matches", _matches)
_Loader.add_constructor("!number", _number)


@dataclass(frozen=True)
class Case:
    """One case. `attempts` are the scripts that a scripted server plays, one for each attempt, the last again."""

    name: str
    promise: str
    server: str
    call: dict[str, Any]
    expect: dict[str, Any]
    before: str | None = None
    during: str | None = None
    attempts: list[list[Any]] = field(default_factory=list)

    @property
    def verb(self) -> str:
        """The verb that is called."""
        return str(self.call["verb"])


def load(folder: Path = FOLDER) -> list[Case]:
    """Every case, in the order of the files. Raises CaseError."""
    # The loader is safe: it adds two constructors of plain values to yaml.SafeLoader.
    files = [yaml.load(path.read_text(), Loader=_Loader) for path in sorted(folder.glob("*.yaml"))]
    cases = [_case(raw) for raws in files for raw in raws]
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CaseError(f"more than one case has the name: {', '.join(twice)}")
    return cases


def _case(raw: dict[str, Any]) -> Case:
    name = raw.get("name", "?")
    script = raw.pop("script", None)
    if script is not None:
        raw["attempts"] = [script]
    try:
        case = Case(**raw)
        _check(case)
    except (CaseError, TypeError, KeyError, json_format.ParseError) as error:
        raise CaseError(f"{name}: {error}") from error
    return case


def _check(case: Case) -> None:
    _require(re.fullmatch(r"[a-z][a-z0-9_]*", case.name), "a name is snake_case")
    _require(case.promise.endswith((".", ")")), "a promise is a sentence")
    _require(case.call.keys() <= CALL_FIELDS, f"a call has the fields {sorted(CALL_FIELDS)}")
    _require(case.expect.keys() <= EXPECT_FIELDS, f"expect has the fields {sorted(EXPECT_FIELDS)}")
    _require(case.expect["ended"] in ("ok", "cancelled", "error"), "ended is ok, cancelled or error")
    _require((case.expect["ended"] == "error") == ("error" in case.expect), "an error is expected if the call ends so")
    _require(case.expect.get("error", {}).keys() <= ERROR_FIELDS, f"an error has the fields {sorted(ERROR_FIELDS)}")
    _require(case.before in (None, *BEFORE), f"before is one of {BEFORE}")
    _require(case.during in (None, *DURING), f"during is one of {DURING}")
    _require(bool(case.attempts) == (case.server == "scripted"), "the scripted server, and no other, plays a script")
    json_format.ParseDict(case.call.get("request", {}), REQUESTS[case.verb]())
    for step in (step for script in case.attempts for step in script):
        json_format.ParseDict(message_of(step), RESPONSES[case.verb]())


def _require(holds: object, rule: str) -> None:
    if not holds:
        raise CaseError(rule)


def message_of(step: Any) -> dict[str, Any]:
    """The message of a step of a script, without what begins with `$`: that is for the server."""
    return {key: value for key, value in step.items() if not key.startswith("$")} if isinstance(step, dict) else {}


def findings(case: Case, answer: dict[str, Any]) -> list[str]:
    """What is wrong with an adapter's answer; nothing if the promise was kept."""
    try:
        return [finding for finding in _compare(case, answer) if finding]
    except (json_format.ParseError, TypeError, AttributeError, KeyError) as error:
        return [f"the answer is not of the protocol: {type(error).__name__}: {error}"]


def _compare(case: Case, answer: dict[str, Any]) -> list[str | None]:
    if "unsupported" in answer:
        return [f"unsupported: {answer['unsupported']}"]
    expect, error = case.expect, answer.get("error")
    found = [_mismatch(expect["ended"], answer.get("ended"), "ended", context=error)]
    found.append(_mismatch(expect.get("error"), error, "error"))
    if error is not None:
        found.append(_well_formed(error))
    if case.verb in STREAMS:
        events = [canonical(event, RESPONSES[case.verb]) for event in answer["events"] or []]
        found += [
            _mismatch(expect["events"], events, "events") if "events" in expect else None,
            _mismatch(expect["counts"], _counts(events), "counts") if "counts" in expect else None,
            _mismatch(expect["texts"], _texts(events), "texts") if "texts" in expect else None,
        ]
    elif "result" in expect:
        result = answer.get("result")
        if case.verb != "complete" and isinstance(result, dict):
            result = canonical(result, RESPONSES[case.verb])
        found.append(_mismatch(expect["result"], result, "result"))
    return found


def canonical(message: dict[str, Any], kind: type[Message]) -> dict[str, Any]:
    """A message in the one JSON form that patterns are written for: zeros are there, unset fields are not."""
    parsed = json_format.ParseDict(message, kind())
    return json_format.MessageToDict(parsed, always_print_fields_with_no_presence=True)


def _well_formed(error: dict[str, Any]) -> str | None:
    if error.keys() != ERROR_FIELDS:
        return f"error has the fields {sorted(error)}, not {sorted(ERROR_FIELDS)}"
    if not isinstance(error["message"], str) or not error["message"].strip():
        return "error.message says nothing"
    return None


def _counts(events: list[dict[str, Any]]) -> dict[str, int]:
    kinds = [next(iter(event), "unknown") for event in events]
    return {kind: kinds.count(kind) for kind in ("started", "delta", "finished", "unknown")}


def _texts(events: list[dict[str, Any]]) -> list[str]:
    """The text of every sequence, by role and index."""
    texts: dict[tuple[int, int], str] = {}
    for delta in (event["delta"] for event in events if "delta" in event):
        key = pb.ModelRole.Value(delta["role"]), delta["sequenceIndex"]
        texts[key] = texts.get(key, "") + delta["text"]
    return [texts[key] for key in sorted(texts)]


def _mismatch(pattern: Any, actual: Any, path: str, context: Any = None) -> str | None:
    """The first difference, in words. What the pattern does not name is free; None means that nothing is there."""
    if isinstance(pattern, dict) and isinstance(actual, dict):
        return _first(_mismatch(value, actual.get(key), f"{path}.{key}") for key, value in pattern.items())
    if isinstance(pattern, list) and isinstance(actual, list):
        return _list_mismatch(pattern, actual, path)
    if _equal(pattern, actual):
        return None
    expected = f"a match of {pattern.pattern}" if isinstance(pattern, re.Pattern) else _short(pattern)
    return f"{path}: expected {expected}, got {_short(actual)}" + (f" ({_short(context)})" if context else "")


def _list_mismatch(pattern: list[Any], actual: list[Any], path: str) -> str | None:
    wanted = pattern[:-1] if pattern and pattern[-1] == REST else pattern
    if len(actual) < len(wanted) or (wanted is pattern and len(actual) > len(wanted)):
        return f"{path}: expected {len(wanted)} elements, got {len(actual)}: {_short(actual)}"
    return _first(_mismatch(one, actual[index], f"{path}[{index}]") for index, one in enumerate(wanted))


def _equal(pattern: Any, actual: Any) -> bool:
    if isinstance(pattern, re.Pattern):
        return isinstance(actual, str) and pattern.fullmatch(actual) is not None
    if isinstance(pattern, bool) or isinstance(actual, bool):
        return pattern is actual
    if pattern is float:
        return isinstance(actual, int | float)
    if isinstance(pattern, int | float) and isinstance(actual, int | float):
        return math.isclose(pattern, actual, rel_tol=RELATIVE_ERROR_MAX)
    return type(pattern) is type(actual) and pattern == actual


def _first(mismatches: Any) -> str | None:
    return next((each for each in mismatches if each), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)"
