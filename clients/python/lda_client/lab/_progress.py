"""How a survey tells of itself: a bar on a terminal, JSON lines for programs, or nothing."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

JSON_INTERVAL_S = 1.0


class Reporter(Protocol):
    """Is told how a survey goes."""

    def begin(self, total: int, done: int) -> None:
        """Rollouts to draw in all, and those that were drawn before."""

    def advance(self, rollouts: int, tokens: int) -> None:
        """So many more were drawn, of so many tokens."""

    def note(self, event: str, **facts: Any) -> None:
        """Something else happened."""

    def end(self) -> None:
        """Nothing follows."""


class Quiet:
    """Tells nothing but what a person must know, on stderr."""

    def begin(self, total: int, done: int) -> None:
        """Nothing to say."""

    def advance(self, rollouts: int, tokens: int) -> None:
        """Nothing to say."""

    def note(self, event: str, **facts: Any) -> None:
        """One line."""
        print(in_words(event, facts), file=sys.stderr, flush=True)

    def end(self) -> None:
        """Nothing to say."""


class JsonLines:
    """One JSON object per line; progress once a second at most."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._begun_at = self._told_at = time.monotonic()
        self._total = self._before = self._done = self._tokens = 0

    def begin(self, total: int, done: int) -> None:
        """The sizes."""
        self._begun_at = time.monotonic()
        self._total, self._before, self._done = total, done, done
        self.note("begin", total=total, done=done)

    def advance(self, rollouts: int, tokens: int) -> None:
        """The sums, if it is time."""
        self._done += rollouts
        self._tokens += tokens
        if time.monotonic() - self._told_at >= JSON_INTERVAL_S:
            self._tell()

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        rate = (self._done - self._before) / max(self._told_at - self._begun_at, 1e-9)
        left = (self._total - self._done) / rate if rate else None
        self.note(
            "progress",
            done=self._done,
            total=self._total,
            tokens=self._tokens,
            rollouts_per_s=round(rate, 3),
            left_s=left and round(left, 1),
        )

    def note(self, event: str, **facts: Any) -> None:
        """One line."""
        print(json.dumps({"event": event, **facts}, ensure_ascii=False), file=self._out, flush=True)

    def end(self) -> None:
        """The last sums."""
        self._tell()


class Bar:
    """A bar with rate and time left, on stderr."""

    def __init__(self) -> None:
        self._progress = _bar()
        self._begun_at = time.monotonic()
        self._rollouts = self._tokens = 0

    def begin(self, total: int, done: int) -> None:
        """Show it."""
        self._begun_at = time.monotonic()
        self._task = self._progress.add_task("rollouts", total=total, completed=done, rate="")
        self._progress.start()

    def advance(self, rollouts: int, tokens: int) -> None:
        """Move it."""
        self._rollouts += rollouts
        self._tokens += tokens
        passed = max(time.monotonic() - self._begun_at, 1e-9)
        rate = f"{self._rollouts / passed:,.1f} rollouts/s, {self._tokens / passed:,.0f} tokens/s"
        self._progress.update(self._task, advance=rollouts, rate=rate)

    def note(self, event: str, **facts: Any) -> None:
        """One line above it."""
        self._progress.console.print(in_words(event, facts), markup=False, highlight=False)

    def end(self) -> None:
        """Leave it as it is."""
        self._progress.stop()


def _bar() -> Progress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )


def in_words(event: str, facts: dict[str, Any]) -> str:
    """An event as a line for people."""
    match event:
        case "away":
            return f"{facts['target']} is away; its calls go elsewhere until it is back. ({facts['why']})"
        case "asks to wait":
            return f"{facts['target']} asks to wait. ({facts['why']})"
        case "back":
            return f"{facts['target']} is back."
    return facts.get("message") or event


def reporter(as_json: bool) -> Reporter:
    """The one that fits where the output goes."""
    if as_json:
        return JsonLines()
    return Bar() if sys.stderr.isatty() else Quiet()
