"""The log of runs: a local SQLite file that remembers what `lda` asked and what came back.

Several `lda` may write at once: every statement is a transaction of its own, in WAL mode, and waits for the others.
Knows the messages and SQLite; nothing of click, calls and printing.

A new version of the schema is one more entry of `MIGRATIONS`, never a change of an old one. A file is brought up to
date by whoever opens it first; one of a newer version is left alone.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from lda_client._html import has_diagnostics

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from google.protobuf.message import Message

    from lda_client import Completion, ScoredText, pb

WAIT_S = 10.0
SCORED = "SCORED"

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE runs (
          id INTEGER PRIMARY KEY AUTOINCREMENT,
          verb TEXT NOT NULL,
          target TEXT NOT NULL,
          request TEXT NOT NULL,
          began_at TEXT NOT NULL,
          ended_at TEXT,
          ended TEXT,
          error TEXT,
          generation_id TEXT,
          pair_fingerprint TEXT,
          seed TEXT,
          alpha REAL
        )
        """,
        """
        CREATE TABLE sequences (
          run_id INTEGER NOT NULL REFERENCES runs (id),
          role TEXT NOT NULL,
          sequence_index INTEGER NOT NULL,
          text TEXT NOT NULL,
          token_ids TEXT NOT NULL,
          reason TEXT,
          matched_stop TEXT,
          alpha_scores TEXT,
          tokens TEXT,
          PRIMARY KEY (run_id, role, sequence_index)
        )
        """,
    ),
)
# Columns that hold JSON.
_JSON = {"request", "token_ids", "matched_stop", "alpha_scores", "tokens"}


class LogUnusable(Exception):
    """The log cannot be read or written, and why."""


def default_path() -> Path:
    """Where the log is: LDA_RUNS_DB, or `lda/runs.db` in the folder for data of the user."""
    if chosen := os.environ.get("LDA_RUNS_DB"):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "lda" / "runs.db"


class RunLog:
    """An open log. Raises LogUnusable from every method."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._db = _open(path)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def begin(self, verb: str, target: str, request: Message) -> int:
        """Remember a run that has been sent; its id."""
        fields = _fields(request)
        values = {"verb": verb, "target": target, "began_at": _now(), "alpha": fields.get("alpha")}
        return self._insert("runs", {**values, "request": _as_json(fields)})

    def started(self, run_id: int, started: pb.Started) -> None:
        """Remember what the server says of it."""
        self._update(
            run_id,
            generation_id=started.generation_id,
            pair_fingerprint=started.pair_fingerprint,
            seed=str(started.seed),
            alpha=_short(started.alpha) if started.HasField("alpha") else None,
        )

    def completion(self, run_id: int, completion: Completion) -> None:
        """Remember one sequence, whole or as far as it came."""
        finished = completion.finish_reason != 0
        self._sequence(
            run_id,
            completion.role_name,
            completion.sequence_index,
            completion.text,
            completion.tokens,
            reason=completion.reason_name if finished else None,
            matched_stop=completion.matched_stop,
            alpha_scores=completion.alpha_scores,
        )

    def scored(self, run_id: int, scored: ScoredText, pair_fingerprint: str | None) -> None:
        """Remember a scored text, as a sequence of its own kind."""
        text = b"".join(token.piece for token in scored.tokens).decode(errors="replace")
        self._sequence(run_id, SCORED, 0, text, scored.tokens, alpha_scores=scored.alpha_scores)
        self._update(run_id, pair_fingerprint=pair_fingerprint)

    def end(self, run_id: int, ended: str, error: str | None = None) -> None:
        """Remember how it ended: `ok`, `cancelled` or `error`."""
        self._update(run_id, ended=ended, ended_at=_now(), error=error)

    def runs(self, limit: int = -1, *, newest_first: bool = False) -> Iterator[dict[str, Any]]:
        """The runs without their sequences; all of them without a limit."""
        order = "DESC" if newest_first else "ASC"
        return self._select(f"SELECT * FROM runs ORDER BY id {order} LIMIT ?", limit)

    def run(self, run_id: int) -> dict[str, Any] | None:
        """One run with its sequences; None if there is none of this id."""
        found = next(self._select("SELECT * FROM runs WHERE id = ?", run_id), None)
        return self.with_sequences(found) if found else None

    def with_sequences(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """The run, and its sequences."""
        query = "SELECT * FROM sequences WHERE run_id = ? ORDER BY role, sequence_index"
        rows = self._select(query, run["id"])
        return {**run, "sequences": [{name: row[name] for name in row if name != "run_id"} for row in rows]}

    def close(self) -> None:
        """Close the file."""
        with suppress(sqlite3.Error):
            self._db.close()

    def _sequence(
        self, run_id: int, role: str, index: int, text: str, tokens: Sequence[pb.Token], **others: object
    ) -> None:
        values = {
            "run_id": run_id,
            "role": role,
            "sequence_index": index,
            "text": text,
            "token_ids": [token.id for token in tokens],
            "tokens": [_fields(token) for token in tokens] if has_diagnostics(tokens) else None,
            **others,
        }
        self._insert("sequences", {name: _cell(name, value) for name, value in values.items()})

    def _insert(self, table: str, values: Mapping[str, object]) -> int:
        marks = ", ".join("?" * len(values))
        return self._write(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", *values.values())

    def _update(self, run_id: int, **values: object) -> None:
        changes = ", ".join(f"{name} = ?" for name in values)
        self._write(f"UPDATE runs SET {changes} WHERE id = ?", *values.values(), run_id)

    def _write(self, statement: str, *values: object) -> int:
        try:
            return self._db.execute(statement, values).lastrowid or 0
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _select(self, query: str, *values: object) -> Iterator[dict[str, Any]]:
        try:
            for row in self._db.execute(query, values):
                yield {name: _value(name, row[name]) for name in row.keys()}  # noqa: SIM118 - a row iterates its values
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> LogUnusable:
        return LogUnusable(f"The log of runs at {self._path} cannot be used: {error}.")


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Prompts are nobody else's business: the file is made before SQLite would make it for all to read.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
    db.row_factory = sqlite3.Row
    with suppress(sqlite3.OperationalError):  # another process may be doing the same just now
        db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    _migrate(db)
    return db


def _migrate(db: sqlite3.Connection) -> None:
    if _version(db) == len(MIGRATIONS):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _version(db)
        if version > len(MIGRATIONS):
            raise sqlite3.DatabaseError("it is of a newer lda: upgrade, or name another file by LDA_RUNS_DB")
        for statement in (each for step in MIGRATIONS[version:] for each in step):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _cell(name: str, value: object) -> object:
    return _as_json(value) if name in _JSON and value is not None else value


def _value(name: str, cell: Any) -> Any:
    return json.loads(cell) if name in _JSON and cell is not None else cell


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _fields(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _short(alpha: float) -> float:
    """A number of 32 bits without the noise of 64."""
    return float(f"{alpha:.7g}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
