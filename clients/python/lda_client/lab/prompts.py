"""Prompts from files: text (one per line), JSONL and CSV. Knows files only: nothing of servers and templates.

    questions.txt       Who are you?
    questions.jsonl     {"id": "who", "prompt": "Who are you?", "topic": "self"}
                        {"messages": [{"role": "user", "content": "Who are you?"}]}
    questions.csv       id,prompt,topic
                        who,Who are you?,self

Fields other than `id`, `prompt` and `messages` are kept as labels. A prompt without an id is named by its file and
line.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from lda_client._requests import build_prompt
from lda_client.lab._errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lda_client.gen.lda.v1 import lda_service_pb2 as pb

Label: TypeAlias = "str | int | float | bool | None"

READ_AS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: names it in the run; unique there.
        content: a string, or the turns of a conversation as (role, content).
        labels: what else its file said of it.
    """

    id: str
    content: str | tuple[tuple[str, str], ...]
    labels: dict[str, Label] = field(default_factory=dict)

    def message(self, *, chat: bool, system: str | None = None) -> pb.Prompt:
        """The message of the contract; a string becomes a user turn if `chat`."""
        raw = isinstance(self.content, str) and not chat
        return build_prompt(self.content, system=system, raw=raw)

    def shown(self) -> str:
        """As a person or a judge reads it."""
        if isinstance(self.content, str):
            return self.content
        return "\n\n".join(f"{role}: {content}" for role, content in self.content)

    def to_json(self) -> dict[str, Any]:
        """A line of a JSONL file that reads back as this prompt."""
        if isinstance(self.content, str):
            return {"id": self.id, "prompt": self.content, **self.labels}
        turns = [{"role": role, "content": content} for role, content in self.content]
        return {"id": self.id, "messages": turns, **self.labels}


class _Entry(NamedTuple):
    """One entry of a file, and where it stood."""

    place: str
    default_id: str
    fields: dict[str, Any]


def read_prompts(paths: Iterable[str | Path], texts: Iterable[str] = ()) -> list[Prompt]:
    """The prompts of these files in order, then the given texts. Raises PromptError."""
    entries = [entry for path in paths for entry in _read(Path(path))]
    entries += [_Entry(f"prompt {n}", f"prompt-{n}", {"prompt": text}) for n, text in enumerate(texts, 1)]
    if not entries:
        raise PromptError("There are no prompts: give a file with prompts, or a prompt.")
    places: dict[str, str] = {}
    return [_prompt(entry, places) for entry in entries]


def to_jsonl(prompts: Sequence[Prompt]) -> str:
    """The text of a JSONL file that reads back as these prompts."""
    return "".join(json.dumps(prompt.to_json(), ensure_ascii=False) + "\n" for prompt in prompts)


def _read(path: Path) -> Iterator[_Entry]:
    kind = READ_AS.get(path.suffix.lower())
    if kind is None:
        raise PromptError(f"{path}: {path.suffix or 'a file without suffix'} is none of {', '.join(READ_AS)}.")
    lines = _lines(path)
    rows = {"text": _text_rows, "jsonl": _jsonl_rows, "csv": _csv_rows}[kind](path, lines)
    for number, fields in rows:
        yield _Entry(f"{path}:{number}", f"{path.stem}-{number}", fields)


def _lines(path: Path) -> list[str]:
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}:{number}: is not UTF-8; save the file as UTF-8.") from None
    # Not str.splitlines, which also splits at form feeds and U+2028: these belong to a prompt.
    return list(io.StringIO(text.replace("\r\n", "\n"), newline="\n"))


def _text_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, {"prompt": line.removesuffix("\n")}


def _jsonl_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}:{number}: is no JSON ({error.msg}, column {error.colno}).") from None
        if not isinstance(fields, dict):
            raise PromptError(f'{path}:{number}: must be an object, such as {{"prompt": "Hi"}}.')
        yield number, fields


def _csv_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise PromptError(f"{path}:1: has no column `prompt`; the first line must name the columns.")
        for fields in reader:
            if None in fields or None in fields.values():
                raise PromptError(f"{path}:{reader.line_num}: has not as many columns as the first line.")
            yield reader.line_num, dict(fields)
    except csv.Error as error:
        raise PromptError(f"{path}:{reader.reader.line_num}: is no CSV ({error}).") from None


def _prompt(entry: _Entry, places: dict[str, str]) -> Prompt:
    """Check one entry. `places` says where the ids so far were given."""
    fields = dict(entry.fields)
    given_id = fields.pop("id", None)
    prompt_id = entry.default_id if given_id is None or given_id == "" else given_id
    if not isinstance(prompt_id, str | int) or isinstance(prompt_id, bool):
        raise PromptError(f"{entry.place}: `id` must be a string or a whole number.")
    prompt_id = str(prompt_id)
    if prompt_id in places:
        raise PromptError(f"{entry.place}: the id {prompt_id!r} was given before, at {places[prompt_id]}.")
    places[prompt_id] = entry.place
    return Prompt(prompt_id, _content(entry, fields), _labels(entry, fields))


def _content(entry: _Entry, fields: dict[str, Any]) -> str | tuple[tuple[str, str], ...]:
    """Take the prompt out of the fields."""
    text, turns = fields.pop("prompt", None), fields.pop("messages", None)
    if (text is None) == (turns is None):
        raise PromptError(f"{entry.place}: needs one of `prompt` and `messages`.")
    if turns is None:
        if not isinstance(text, str) or not text:
            raise PromptError(f"{entry.place}: `prompt` must be a text that is not empty.")
        return text
    if not isinstance(turns, list) or not turns:
        raise PromptError(f"{entry.place}: `messages` must be a list of turns.")
    return tuple(_turn(entry, turn) for turn in turns)


def _turn(entry: _Entry, turn: Any) -> tuple[str, str]:
    match turn:
        case {"role": str(role), "content": str(content), **others} if not others:
            return role, content
    raise PromptError(f'{entry.place}: {turn!r} is no turn; give {{"role": ..., "content": ...}}.')


def _labels(entry: _Entry, fields: dict[str, Any]) -> dict[str, Label]:
    for name, value in fields.items():
        if not isinstance(value, str | int | float | bool | None):
            raise PromptError(f"{entry.place}: the label {name!r} must be a text, a number, true, false or null.")
    return fields
