"""One streaming call of a command: Ctrl-C cancels it, and the log remembers it.

Knows the streams of the client and the log; nothing of printing.
"""

from __future__ import annotations

import functools
import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Generic

import click

from lda_client import LdaClientError, pb
from lda_client._cli._common import INTERRUPTED_EXIT_CODE, note, with_options
from lda_client._cli._log import LogUnusable, RunLog, default_path
from lda_client._gather import GenerateEventT, GenerateReader, ScoreReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lda_client import Completion, GenerateStream, LdaClient, ScoredText, ScoreStream
    from lda_client._stream import Request

_NO_LOG = click.option(
    "--no-log", is_flag=True, envvar="LDA_NO_LOG", show_envvar=True, help="Do not remember this run; see `lda runs`."
)


def with_log(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option --no-log, and a `Recorder` as its argument `recorder`."""

    @functools.wraps(command)
    def run(*positional: Any, no_log: bool, **arguments: Any) -> None:
        recorder = Recorder(enabled=not no_log)
        try:
            command(*positional, recorder=recorder, **arguments)
        finally:
            recorder.close()

    return with_options(run, [_NO_LOG])


class Recorder:
    """Writes one run into the log as it goes. The first failure is a warning, and the last attempt."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._log: RunLog | None = None
        self._run_id = 0

    def begin(self, verb: str, target: str, request: Request) -> None:
        """Remember that the request has been sent."""
        if self.enabled:
            with self._warning():
                self._log = RunLog(default_path())
                self._run_id = self._log.begin(verb, target, request)

    def write(self, write: Callable[..., None], *arguments: object) -> None:
        """Write more of this run, by a method of the log, if it is remembered at all."""
        if self._log is not None:
            with self._warning():
                write(self._log, self._run_id, *arguments)

    @contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except LogUnusable as reason:
            note(f"Warning: this run is not remembered. {reason}")
            self.enabled = False
            self.close()

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
            self._log = None


class GenerationRun(Generic[GenerateEventT]):
    """Iterate over it for every event, and the completion that it completes if it does."""

    def __init__(self, stream: GenerateStream[GenerateEventT], recorder: Recorder) -> None:
        self.stream: GenerateStream[GenerateEventT] = stream
        self._recorder = recorder
        self._reader = GenerateReader(1, stream.score_alphas)

    def __iter__(self) -> Iterator[tuple[GenerateEventT, Completion | None]]:
        for event in self.stream:
            yield event, self._take(event)
        _require_end(self.stream)

    def _take(self, event: GenerateEventT) -> Completion | None:
        self._reader.add(event)
        if event.HasField("started"):
            self._recorder.write(RunLog.started, event.started)
        if not event.HasField("finished"):
            return None
        completion = self._reader.take(event.finished)
        self._recorder.write(RunLog.completion, completion)
        return completion

    def keep_unfinished(self) -> None:
        """Remember what there is of sequences that did not come to their end."""
        for completion in self._reader.take_unfinished():
            self._recorder.write(RunLog.completion, completion)


@contextmanager
def generation_run(
    client: LdaClient, verb: str, stream: GenerateStream[GenerateEventT], recorder: Recorder
) -> Iterator[GenerationRun[GenerateEventT]]:
    """Run a generation: its events to iterate over."""
    run = GenerationRun(stream, recorder)
    with _remembered(client, verb, stream, recorder), interruptible(stream):
        try:
            yield run
        finally:
            run.keep_unfinished()


class ScoreRun:
    """Iterate over it for every block; then `result()` is the whole."""

    def __init__(self, stream: ScoreStream) -> None:
        self._stream = stream
        self._reader = ScoreReader(stream.score_alphas)

    def __iter__(self) -> Iterator[pb.ScoreResponse]:
        for block in self._stream:
            self._reader.add(block)
            yield block
        _require_end(self._stream)

    def result(self) -> ScoredText:
        """What all blocks come to."""
        return self._reader.result()


@contextmanager
def score_run(client: LdaClient, stream: ScoreStream, recorder: Recorder) -> Iterator[ScoreRun]:
    """Run a score: its blocks to iterate over."""
    run = ScoreRun(stream)
    with _remembered(client, "score", stream, recorder), interruptible(stream):
        yield run
        _keep_scored(client, run.result(), recorder)


def _keep_scored(client: LdaClient, scored: ScoredText, recorder: Recorder) -> None:
    fingerprint = None
    if recorder.enabled:
        with suppress(LdaClientError):  # only the pair of a generation is named in its stream
            fingerprint = client.model_pair().pair_fingerprint
    recorder.write(RunLog.scored, scored, fingerprint)


@contextmanager
def _remembered(
    client: LdaClient, verb: str, stream: GenerateStream[Any] | ScoreStream, recorder: Recorder
) -> Iterator[None]:
    """Remember a run: that it was sent, and how it ended."""
    recorder.begin(verb, client.target, stream.request)
    ended, reason = "cancelled", None
    try:
        with stream:
            yield
        ended = "ok"
    except LdaClientError as error:
        ended, reason = "error", f"{type(error).__name__}: {error}"
        raise
    finally:
        recorder.write(RunLog.end, ended, reason)


def _require_end(stream: GenerateStream[Any] | ScoreStream) -> None:
    """A stream that was closed just ends; the command that waited for it was interrupted then."""
    if stream.cancelled:
        raise click.exceptions.Exit(INTERRUPTED_EXIT_CODE)


@contextmanager
def interruptible(stream: GenerateStream[Any] | ScoreStream) -> Iterator[None]:
    """Ctrl-C cancels the call, and what reads the stream sees it end. A second one interrupts whatever goes on.

    The usual handler raises where the program happens to be. In a callback of gRPC the exception is dropped, and the
    command would wait on. So this one only wakes a thread, which closes the stream.
    """
    if not _takes_interrupts():
        yield
        return
    over = threading.Event()
    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        over.set()

    def close() -> None:
        over.wait()
        stream.close()

    closer = threading.Thread(target=close, daemon=True)
    closer.start()
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        over.set()
        closer.join()
    if interrupted:
        raise click.exceptions.Exit(INTERRUPTED_EXIT_CODE)


def _takes_interrupts() -> bool:
    """Not if they are ignored, as in the background of a script, and not where no handler can be set."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
