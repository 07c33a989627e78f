"""What a judge sees, what it says, and a store of verdicts that cost something.

Knows nothing of runs, alphas or prompts' ids: neither does any judge.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from abc import ABC, abstractmethod
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType


class Case(NamedTuple):
    """One thing to judge: a completion; its prompt only if the judge is to see it."""

    completion: str
    prompt: str | None = None


class Verdict(NamedTuple):
    """Whether the completion shows the behaviour; None if the judge cannot tell. The score is what decided, if any."""

    hit: bool | None
    score: float | None = None


class Judge(ABC):
    """Says of completions whether they show a behaviour."""

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """How it judges, as JSON; judges with equal descriptions judge alike."""

    @abstractmethod
    def judge(self, cases: Sequence[Case], done: Callable[[int], None]) -> list[Verdict]:
        """Judge cases that all differ. `done` is told how many more were judged. Raises JudgeError."""

    def verdicts(self, cases: Sequence[Case], done: Callable[[int], None]) -> list[Verdict]:
        """Judge any cases, each that comes again only once. Raises JudgeError."""
        distinct = list(dict.fromkeys(cases))
        answers = dict(zip(distinct, self.judge(distinct, done), strict=True))
        return [answers[case] for case in cases]


class VerdictStore:
    """Verdicts on disk, by case and by what judged it; safe against the end of the process. A context manager.

    Args:
        path: of its file, which is made if there is none.
        judge: what judges: verdicts of another one are another's.
    """

    def __init__(self, path: Path, judge: Mapping[str, Any]) -> None:
        self._judge = json.dumps(judge, sort_keys=True, ensure_ascii=True)
        self._database = sqlite3.connect(path)
        with self._database:
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, hit INTEGER, score REAL)"
            )

    def _key(self, case: Case) -> str:
        named = json.dumps([self._judge, case.completion, case.prompt], ensure_ascii=True)
        return hashlib.sha256(named.encode()).hexdigest()

    def get(self, case: Case) -> Verdict | None:
        """The verdict on a case; None if there is none yet."""
        query = "SELECT hit, score FROM verdicts WHERE key = ?"
        with closing(self._database.execute(query, [self._key(case)])) as cursor:
            row = cursor.fetchone()
        return None if row is None else Verdict(None if row[0] is None else bool(row[0]), row[1])

    def put(self, case: Case, verdict: Verdict) -> None:
        """Keep a verdict."""
        with self._database:
            self._database.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", [self._key(case), *verdict])

    def drop(self, case: Case) -> None:
        """Forget a verdict."""
        with self._database:
            self._database.execute("DELETE FROM verdicts WHERE key = ?", [self._key(case)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
