"""The worker process: owns the engine, and with it both models and both KV caches.

Its loop runs at its own pace: drain the inbox, take one step, send one batch of events. Knows the pipe's messages and
the engine's interface; nothing of gRPC, asyncio or torch. It dies with the server, and ends itself after a fault that
may have spoilt the engine: the server starts a fresh one.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import signal
from typing import TYPE_CHECKING, Protocol

from lda_service.engine.request import Admitted, Load, RequestFailed
from lda_service.errors import InternalError, LdaError, OutOfMemory
from lda_service.processes import end_with_parent
from lda_service.telemetry import configure_logging
from lda_service.worker.messages import (
    Cancel,
    EventBatch,
    Ping,
    Pong,
    Ready,
    Shutdown,
    StartFailed,
    Submit,
    ends_sequence,
    sequences_of,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from lda_service.config import Config
    from lda_service.engine.request import Event, GenerationRequest, ScoreRequest
    from lda_service.pair_info import PairInfo
    from lda_service.worker.messages import Inbound, Outbound

    Pipe = Connection[Outbound, Inbound]

NATIVE = "lda_service.worker.process:load_engine"
VLLM, VLLM_FOLLOWER = (f"lda_service.vllm_engine.{name}" for name in ("engine:load_engine", "follower:load_follower"))

log = logging.getLogger(__name__)


class DecodingEngine(Protocol):
    """What the loop needs of an engine.

    After an out-of-memory error in `step`, `cancel` of the requests that were running must leave it usable.
    """

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def submit(self, request: GenerationRequest | ScoreRequest) -> None:
        """Queue a request, or raise a `RequestError` or `QueueFull`."""

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""

    def step(self) -> list[Event]:
        """Advance every running sequence by one token."""

    def load(self) -> Load:
        """How busy the engine is."""

    def warm_up(self) -> None:
        """Run a short generation through the whole path."""


def factory_of(config: Config) -> str:
    """What makes the engine that the settings ask for, as `main` takes it."""
    if config.backend == "native":
        return NATIVE
    return VLLM_FOLLOWER if config.vllm.node_rank else VLLM


def load_engine(config: Config) -> tuple[DecodingEngine, PairInfo]:
    """The real engine over the configured pair. Imports torch here, in the worker, and nowhere earlier."""
    from lda_service.engine.engine import Engine
    from lda_service.engine.pair import load_pair
    from lda_service.engine.threads import settle_process

    pair = load_pair(config.pair)
    settle_process(pair)
    return Engine(pair, config.engine), pair.info


def main(connection: Pipe, config: Config, factory: str) -> None:
    """Entry point of the process.

    Args:
        connection: the worker's end of the pipe.
        config: the settings of the server.
        factory: "module:function" that makes the engine from the settings, resolved here.
    """
    configure_logging(config.telemetry.log_format, config.telemetry.log_level)
    _settle_in()
    try:
        engine = _start(connection, config, factory)
        healthy = engine is not None and WorkerLoop(connection, engine).run()
    except (EOFError, OSError):
        log.info("the server is gone; the worker ends")
        healthy = False
    connection.close()
    _leave(0 if healthy else 1)


def _settle_in() -> None:
    """Leave signals sent to the whole group to the server, and end at once when its process ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Read when torch is loaded. The server's process needs a core now and then: threads that spin for long at a barrier
    # would hold up the one thread that is late, for a time slice at each of some hundred barriers of a step.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    end_with_parent()


def _leave(code: int) -> None:
    """Run what was registered for the exit, but not the tear-down of torch: it takes seconds, the system none."""
    atexit._run_exitfuncs()
    os._exit(code)


def _start(connection: Pipe, config: Config, factory: str) -> DecodingEngine | None:
    """Load and warm up, and tell the server how it went."""
    try:
        module, _, function = factory.partition(":")
        engine, pair = getattr(importlib.import_module(module), function)(config)
        engine.warm_up()
    except LdaError as error:
        connection.send(StartFailed(error))
        return None
    except Exception:
        log.exception("the models could not be loaded")
        connection.send(StartFailed(InternalError("The models could not be loaded; the traceback is in the log.")))
        return None
    connection.send(Ready(pair))
    ready: DecodingEngine = engine
    return ready


class WorkerLoop:
    """Feeds one engine from one pipe. Single-threaded: nothing else touches either."""

    def __init__(self, connection: Pipe, engine: DecodingEngine) -> None:
        self._connection = connection
        self._engine = engine
        self._unfinished: dict[str, int] = {}  # sequences still to end; set on submit, counted down as events leave
        self._admitted: set[str] = set()  # those of them that were admitted
        self._events: list[Event] = []  # of this round; emptied by _send
        self._load = Load()  # as last sent

    def run(self) -> bool:
        """Serve until the server says stop; False if the engine broke before that."""
        healthy = True
        while healthy and self._drain_inbox():
            healthy = not self._engine.has_work or self._step()
            self._send()
        return healthy

    def _drain_inbox(self) -> bool:
        """Take what has arrived, waiting only when there is nothing to do; False on shutdown."""
        idle = not self._engine.has_work
        while idle or self._connection.poll(0):
            idle = False
            match self._connection.recv():
                case Submit(request):
                    self._submit(request)
                case Cancel(request_id):
                    self._forget(request_id)
                case Ping():
                    self._connection.send(Pong())
                case Shutdown():
                    return False
        return True

    def _submit(self, request: GenerationRequest | ScoreRequest) -> None:
        try:
            self._engine.submit(request)
        except LdaError as error:
            self._events.append(RequestFailed(request.request_id, error))
        except Exception:
            ids = {"generation_id": request.request_id}
            log.exception("generation %s could not be submitted", request.request_id, extra=ids)
            self._events.append(RequestFailed(request.request_id, InternalError("The request could not be queued.")))
        else:
            self._unfinished[request.request_id] = sequences_of(request)

    def _step(self) -> bool:
        """One step; False when the engine can no longer be trusted."""
        try:
            events = self._engine.step()
        except Exception as error:
            log.exception("step failed with %d requests in flight", len(self._unfinished))
            return self._survive(error)
        for event in events:
            self._account(event)
        self._events += events
        return True

    def _account(self, event: Event) -> None:
        """Keep the books of what is in flight."""
        request_id = event.request_id
        if isinstance(event, Admitted):
            self._admitted.add(request_id)
        elif isinstance(event, RequestFailed):
            self._close_book(request_id)
        elif ends_sequence(event) and request_id in self._unfinished:
            self._unfinished[request_id] -= 1
            if not self._unfinished[request_id]:
                self._close_book(request_id)

    def _survive(self, error: Exception) -> bool:
        """Out of memory costs the running requests; anything else costs all of them, and the process."""
        if any(kind.__name__ in ("OutOfMemoryError", "MemoryError") for kind in type(error).__mro__):
            for request_id in sorted(self._admitted or self._unfinished):
                self._fail(request_id, OutOfMemory("Device memory ran out; ask for fewer sequences or tokens."))
            return True
        for request_id in list(self._unfinished):
            self._events.append(RequestFailed(request_id, InternalError("The engine failed while decoding.")))
        return False

    def _fail(self, request_id: str, error: LdaError) -> None:
        self._forget(request_id)
        self._events.append(RequestFailed(request_id, error))

    def _forget(self, request_id: str) -> None:
        self._engine.cancel(request_id)
        self._close_book(request_id)

    def _close_book(self, request_id: str) -> None:
        self._unfinished.pop(request_id, None)
        self._admitted.discard(request_id)

    def _send(self) -> None:
        """One batch, if there is news."""
        load = self._engine.load()
        if self._events or load != self._load:
            self._connection.send(EventBatch(tuple(self._events), load))
            self._events, self._load = [], load
