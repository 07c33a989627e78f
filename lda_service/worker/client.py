"""The asyncio side of the worker: starts it, submits, streams, cancels, and replaces it when it dies.

Two threads per worker do the blocking: one receives and hands each batch to the loop with one call, one sends, so that
a full pipe never blocks the loop. Everything else lives on the event loop. Knows processes and pipes; nothing of gRPC,
and nothing of what is generated.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import threading
import time
from enum import Enum
from multiprocessing.connection import wait
from queue import SimpleQueue
from typing import TYPE_CHECKING

from lda_service.engine.request import Load
from lda_service.errors import Aborted, LdaError, Loading, StartupError, WorkerDied
from lda_service.worker import process as worker_process
from lda_service.worker.messages import Cancel, EventBatch, Ping, Ready, Shutdown, StartFailed, Submit
from lda_service.worker.stream import EventStream

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from lda_service.config import Config
    from lda_service.engine.request import GenerationRequest, ScoreRequest
    from lda_service.pair_info import PairInfo
    from lda_service.worker.messages import Inbound, Outbound

    Pipe = Connection[Inbound, Outbound]
    Receiver = Callable[["WorkerProcess", Outbound | None], None]

RESTART_DELAY_S = 0.5
RESTART_DELAY_MAX_S = 30.0
HEARTBEATS = 4  # asked for within the time a worker may be silent
SHUTDOWN_WAIT_S = 2.0

log = logging.getLogger(__name__)


class WorkerState(Enum):
    """Where the worker stands. READY is the only one that serves."""

    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"
    FAILED = "failed"
    CLOSED = "closed"


class WorkerProcess:
    """One incarnation of the worker: a process, its pipe, and a thread for each direction.

    Args:
        config: handed to the process.
        factory: handed to the process.
        receive: called on the loop with every message, and with None when the process is gone.
    """

    def __init__(self, config: Config, factory: str, receive: Receiver) -> None:
        context = multiprocessing.get_context("spawn")
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._connection: Pipe
        self._connection, self._remote_end = context.Pipe()
        self._outbox: SimpleQueue[Inbound | None] = SimpleQueue()  # filled on the loop, emptied by the writer
        self._process: SpawnProcess = context.Process(
            target=worker_process.main, args=(self._remote_end, config, factory), name="worker"
        )

        self._reader = threading.Thread(target=self._read, name="worker-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="worker-writer", daemon=True)
        self.exit_code: int | None = None  # negative for a signal; set by the reader, which alone reaps the process

    @property
    def pid(self) -> int | None:
        """The process id, for the log and for tests."""
        return self._process.pid

    def start(self) -> None:
        """Spawn the process; blocks for some milliseconds, so it is called off the loop."""
        # A daemon would end with this process too, but may have no processes of its own, which a group's ranks are.
        self._process.start()
        atexit.register(self.kill)
        self._remote_end.close()  # ours must be the only copy left, or the end of the worker goes unseen
        self._reader.start()
        self._writer.start()

    def send(self, message: Inbound) -> None:
        """Queue a message; never blocks."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End it at once; `receive` is told when it is gone."""
        self._process.kill()

    def stop(self, wait_s: float) -> None:
        """Wait for the process to end by itself, then make it. Blocks, so it is called off the loop."""
        if self.pid is None:
            return
        self._reader.join(wait_s)
        if self._reader.is_alive():
            self._process.kill()  # it leaves SIGTERM to us
            self._reader.join(1.0)
        self._outbox.put(None)

    def _read(self) -> None:
        """Thread: every message goes to the loop at once, and the end of the process as None."""
        try:
            while self._connection in wait([self._connection, self._process.sentinel]):
                self._hand_over(self._connection.recv())
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("the worker sent something unreadable")
        self._process.join(1.0)
        self.exit_code = self._process.exitcode
        self._hand_over(None)
        self._process.join()
        atexit.unregister(self.kill)

    def _write(self) -> None:
        """Thread: send until told to stop or the pipe breaks."""
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)
        except OSError:
            log.debug("the worker no longer reads")

    def _hand_over(self, message: Outbound | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._receive, self, message)
        except RuntimeError:
            log.debug("the event loop is closed")


class WorkerClient:
    """The worker as the server sees it: always the same object, whichever process is behind it.

    Args:
        config: settings; handed to the worker process too.
        factory: "module:function" that makes the engine, resolved in the worker process; None: that of the backend.
        on_state: called on the loop at every change of state.
        on_load: called on the loop whenever the engine says how busy it is, and with nothing when it is gone.
    """

    def __init__(
        self,
        config: Config,
        factory: str | None = None,
        on_state: Callable[[WorkerState], None] = lambda state: None,
        on_load: Callable[[Load], None] = lambda load: None,
    ) -> None:
        self._config = config
        self._factory = factory or worker_process.factory_of(config)
        self._on_state = on_state
        self._on_load = on_load
        self._state = WorkerState.LOADING
        self._pair: PairInfo | None = None  # of the worker that was last ready
        self._load = Load()  # as last reported
        self._streams: dict[str, EventStream] = {}  # those the worker still owes events
        self._worker: WorkerProcess | None = None  # set by _run_worker
        self._spawned: asyncio.Future[None] | None = None  # done when _worker has a process; set by _run_worker
        self._gone: asyncio.Future[None] | None = None  # done when _worker has ended; set by _run_worker
        self._first_start: asyncio.Future[PairInfo] | None = None  # set by start
        self._supervisor: asyncio.Task[None] | None = None  # set by start
        self._heard_at = 0.0  # when the present worker last said anything

    @property
    def state(self) -> WorkerState:
        """Where the worker stands."""
        return self._state

    @property
    def pair(self) -> PairInfo | None:
        """The loaded pair; kept while a dead worker is being replaced."""
        return self._pair

    @property
    def load(self) -> Load:
        """How busy the engine was when it last said so."""
        return self._load

    @property
    def pid(self) -> int | None:
        """Process id of the present worker."""
        return self._worker.pid if self._worker else None

    @property
    def open_streams(self) -> int:
        """Requests the worker still owes events."""
        return len(self._streams)

    def start(self) -> None:
        """Begin to load; see `ready` for the outcome."""
        self._first_start = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="worker-supervisor")

    async def ready(self) -> PairInfo:
        """Wait for the first worker to be loaded and warmed up.

        Raises:
            LdaError: it cannot start; no other attempt is made.
        """
        assert self._first_start is not None, "start() comes first"
        return await asyncio.shield(self._first_start)

    def stream(
        self, request: GenerationRequest | ScoreRequest, on_failure: Callable[[], None] = lambda: None
    ) -> EventStream:
        """Submit a request and return its events. Leaving the stream's `with` cancels what is left of it.

        Args:
            request: what to do.
            on_failure: called on the loop when the stream fails, even if nobody reads it.

        Raises:
            Loading: no worker is ready.
        """
        if self._state is not WorkerState.READY:
            raise Loading("The models are being loaded; try again shortly.", retry_after_s=1.0)
        stream = EventStream(request, self._config.server.max_buffered_tokens, self._release, on_failure)
        self._streams[request.request_id] = stream
        self._send(Submit(request))
        return stream

    def fail_streams(self, error: LdaError) -> None:
        """End every open stream with this error; the worker stops working on them."""
        for stream in list(self._streams.values()):
            stream.fail(error)

    async def close(self) -> None:
        """End the worker process; open streams get `Aborted`."""
        if self._state is WorkerState.CLOSED:
            return
        was_ready = self._state is WorkerState.READY
        self.fail_streams(Aborted("The server is shutting down."))
        self._set_state(WorkerState.CLOSED)
        self._send(Shutdown())
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        if self._worker is not None and self._spawned is not None:
            await asyncio.wait({self._spawned})
            await asyncio.to_thread(self._worker.stop, SHUTDOWN_WAIT_S if was_ready else 0.0)
        if self._first_start is not None:
            self._first_start.cancel()

    def _send(self, message: Inbound) -> None:
        if self._worker is not None:
            self._worker.send(message)

    def _release(self, stream: EventStream) -> None:
        """A stream ended: forget it, and stop the worker's share of it unless that ended first."""
        if self._streams.pop(stream.request_id, None) is not None and not stream.settled:
            self._send(Cancel(stream.request_id))

    async def _supervise(self) -> None:
        """Keep one worker running; the delay between attempts grows while they do not last."""
        delay_s = RESTART_DELAY_S
        while True:
            lasted_s = await self._run_worker()
            if self._state is WorkerState.FAILED:
                return
            delay_s = RESTART_DELAY_S if lasted_s > RESTART_DELAY_MAX_S else delay_s
            log.warning("a fresh worker starts in %.1f s", delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RESTART_DELAY_MAX_S)
            self._set_state(WorkerState.LOADING)

    async def _run_worker(self) -> float:
        """Run one worker to its end; how long it lasted."""
        started = time.perf_counter()
        self._gone = asyncio.get_running_loop().create_future()
        self._worker = WorkerProcess(self._config, self._factory, self._receive)
        self._spawned = asyncio.ensure_future(asyncio.to_thread(self._worker.start))
        try:
            await asyncio.shield(self._spawned)
        except OSError:
            log.exception("no process could be started")
            self._worker_ended(self._worker)
            return 0.0
        log.info("worker %s started", self._worker.pid)
        watch = asyncio.create_task(self._watch(self._worker), name="worker-heartbeat")
        await self._gone
        watch.cancel()
        await asyncio.to_thread(self._worker.stop, 1.0)
        return time.perf_counter() - started

    async def _watch(self, worker: WorkerProcess) -> None:
        """Ask for a sign of life now and then, and end a worker that gives none: it is replaced like a dead one."""
        interval_s = self._config.server.worker_timeout_s / HEARTBEATS
        asked_at, unanswered = 0.0, 0
        while True:
            await asyncio.sleep(interval_s)
            if self._state is not WorkerState.READY:
                asked_at, unanswered = 0.0, 0
                continue
            # Not the time since it was heard of: that grows while this process itself stands still.
            unanswered = unanswered + 1 if self._heard_at < asked_at else 0
            if unanswered >= HEARTBEATS:
                log.error("worker %s has not answered for %.1f s and is ended", worker.pid, unanswered * interval_s)
                worker.kill()
                return
            asked_at = time.perf_counter()
            worker.send(Ping())

    def _receive(self, worker: WorkerProcess, message: Outbound | None) -> None:
        """On the loop: one message of the worker, or None for its end."""
        self._heard_at = time.perf_counter()
        match message:
            case EventBatch(events, load):
                self._set_load(load)
                for event in events:
                    if (stream := self._streams.get(event.request_id)) is not None:
                        stream.push(event)
            case Ready(pair):
                self._start_succeeded(pair)
            case StartFailed(error):
                self._start_failed(error)
            case None:
                self._worker_ended(worker)

    def _start_succeeded(self, pair: PairInfo) -> None:
        self._pair = pair
        if self._state is WorkerState.LOADING:
            self._set_state(WorkerState.READY)
        if self._first_start is not None and not self._first_start.done():
            self._first_start.set_result(pair)

    def _start_failed(self, error: LdaError) -> None:
        """Fatal at the first start, which an operator watches; later on it is tried again."""
        log.error("the worker could not start: %s", error.message)
        if self._first_start is not None and not self._first_start.done():
            self._set_state(WorkerState.FAILED)
            self._first_start.set_exception(error)

    def _worker_ended(self, worker: WorkerProcess) -> None:
        """Tell every open stream at once, then let the supervisor act."""
        if self._state is WorkerState.CLOSED:
            return
        if self._first_start is not None and not self._first_start.done():
            self._start_failed(_died_loading(worker))
        self._set_load(Load())
        if self._state is not WorkerState.FAILED:
            log.error("worker %s ended with code %s; %d streams", worker.pid, worker.exit_code, self.open_streams)
            self._set_state(WorkerState.DEAD)
        self.fail_streams(
            WorkerDied(
                "The process that runs the models died; a fresh one is being started. Try again shortly.",
                retry_after_s=RESTART_DELAY_S,
            )
        )
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def _set_load(self, load: Load) -> None:
        self._load = load
        self._on_load(load)

    def _set_state(self, state: WorkerState) -> None:
        if state is not self._state:
            self._state = state
            self._on_state(state)


def _died_loading(worker: WorkerProcess) -> StartupError:
    return StartupError(
        f"The worker process ended with code {worker.exit_code} while loading the models; "
        "code -9 usually means that memory ran out: use smaller models or a smaller DTYPE."
    )
