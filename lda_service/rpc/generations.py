"""Everything between a message and the events of the worker: rendering, admission, the list of what is open.

All services of the server share one `Generations`. Knows calls as far as they have a deadline, an end and a caller;
nothing of messages going out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lda_service.engine.request import Admitted
from lda_service.errors import Aborted, Draining, LdaError, Loading, UnknownGeneration
from lda_service.rpc.admission import Admission, Ticket
from lda_service.rpc.interceptors import request_id
from lda_service.rpc.metrics import Cause
from lda_service.telemetry import set_log_fields
from lda_service.worker.client import WorkerState
from lda_service.worker.messages import ends_sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc

    from lda_service.config import AdmissionConfig, Config, EngineConfig
    from lda_service.engine.request import Event, GenerationRequest, Load, ScoreRequest
    from lda_service.pair_info import PairInfo
    from lda_service.rpc.convert import Prompter
    from lda_service.rpc.observation import GenerationWatch, Telemetry
    from lda_service.worker.client import WorkerClient
    from lda_service.worker.stream import EventStream

    Context = grpc.aio.ServicerContext[Any, Any]

_Message = TypeVar("_Message")
_Request = TypeVar("_Request")

log = logging.getLogger(__name__)


class Generations:
    """What is open on this server, and the only way to open more.

    Args:
        worker: owns the models.
        config: limits.
        telemetry: is told what happens.
    """

    def __init__(self, worker: WorkerClient, config: Config, telemetry: Telemetry) -> None:
        self._worker = worker
        self._telemetry = telemetry
        self._log_prompts = config.telemetry.log_prompts
        self.limits: EngineConfig = config.engine
        self.admission_limits: AdmissionConfig = config.admission
        self.admission = Admission(config.engine, config.admission)
        self.prompter: Prompter | None = None  # set by the server when the tokenizer is loaded
        self.draining = False  # set by the server when it stops taking work
        self.open: dict[str, Generation] = {}  # by generation id, oldest first
        # One thread: tokenizers may not be used from two at once, and a long text must not hold up the loop.
        self._rendering = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        admission = self.admission
        telemetry.metrics.follow(
            open_requests=lambda: admission.open_requests, waiting_requests=lambda: admission.waiting_requests
        )

    @property
    def accepts_work(self) -> bool:
        """Whether a request that came now would be looked at."""
        return not self.draining and self.prompter is not None and self._worker.state is WorkerState.READY

    @property
    def engine_load(self) -> Load:
        """How busy the engine was when it last said so."""
        return self._worker.load

    def pair(self) -> PairInfo:
        """What is loaded. Raises `Loading` while nothing is."""
        if self._worker.pair is None:
            raise _loading()
        return self._worker.pair

    async def render(
        self, make: Callable[[_Message, str, Prompter, EngineConfig], _Request], message: _Message
    ) -> _Request:
        """The worker's request for a message, under a fresh id.

        Raises:
            Refused: the server takes no work now.
            RequestError: the prompt cannot be rendered, or breaks a limit.
        """
        if self.draining:
            raise Draining("The server is shutting down; another one may serve this.")
        if self.prompter is None or not self.accepts_work:
            raise _loading()
        generation_id = f"g-{secrets.token_hex(8)}"
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._rendering, make, message, generation_id, self.prompter, self.limits)

    @contextmanager
    def run(self, request: GenerationRequest | ScoreRequest, caller: str, context: Context) -> Iterator[Generation]:
        """Open a generation; the worker stops when the call ends, however it ends.

        Raises:
            Refused: it is not admitted.
        """
        now = time.perf_counter()
        ticket = self.admission.admit(request, caller, context.time_remaining(), now)
        outcome = "cancelled"
        set_log_fields(generation_id=request.request_id, caller=caller)

        def give_up_place() -> None:
            # The handler of a reader that has stopped is stuck in a write, and its place would stay taken.
            self.admission.close(ticket, time.perf_counter())

        try:
            with self._worker.stream(request, give_up_place) as stream:
                watch = self._telemetry.submitted(request, self.pair().after.model_id, now)
                generation = Generation(request, ticket, stream, now, self.admission, watch)
                self.open[request.request_id] = generation
                log.info("generation %s submitted by request %s", request.request_id, request_id.get())
                if self._log_prompts:
                    self._rendering.submit(copy_context().run, self._log_prompt, request)
                # A handler that is stuck in a write is not resumed when its call ends: this callback is called.
                context.add_done_callback(lambda _: self._end(generation, context))  # type: ignore[arg-type]
                yield generation
            outcome = "complete"
        except Exception as error:
            outcome = error.reason if isinstance(error, LdaError) else "failed"
            raise
        finally:
            self.open.pop(request.request_id, None)
            give_up_place()
            log.info("generation %s %s after %.3f s", request.request_id, outcome, time.perf_counter() - now)

    def abort(self, generation_id: str) -> None:
        """End a generation for an operator. Raises `UnknownGeneration`."""
        generation = self.open.get(generation_id)
        if generation is None:
            raise UnknownGeneration(
                "No generation of this id is open here; it may have ended, or run on another server.",
                metadata={"generation_id": generation_id},
            )
        generation.watch.ended_early(Cause.OPERATOR)
        generation.stream.fail(Aborted("An operator ended this generation."))

    def _log_prompt(self, request: GenerationRequest | ScoreRequest) -> None:
        """In the thread that renders, which alone may use the tokenizer."""
        if self.prompter is not None:
            log.info("generation %s asks: %s", request.request_id, self.prompter.decode(request.prompt_ids))

    def _end(self, generation: Generation, context: Context) -> None:
        generation.watch.call_ended(generation.stream.error, context)
        generation.stream.close()
        self.open.pop(generation.request.request_id, None)
        self.admission.close(generation.ticket, time.perf_counter())


@dataclass(eq=False, slots=True)
class Generation:
    """One open request and its events, counted for the admission of others as they are read."""

    request: GenerationRequest | ScoreRequest
    ticket: Ticket
    stream: EventStream
    arrived: float
    admission: Admission
    watch: GenerationWatch

    @property
    def exhausted(self) -> bool:
        """Whether everything was read and nothing will follow."""
        return self.stream.exhausted

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """See `EventStream.next`."""
        event = await self.stream.next(timeout_s)
        if event is None:
            return None
        now = time.perf_counter()
        self.watch.saw(event, now)
        if isinstance(event, Admitted):
            self.admission.started(self.ticket, now)
        elif ends_sequence(event):
            self.admission.ended(self.ticket, now)
        return event


def _loading() -> Loading:
    return Loading("The models are being loaded; try again shortly.", retry_after_s=1.0)
