"""Jobs spread over several servers, within a limit of calls at once; what a server drops is done again elsewhere.

Knows jobs, servers and errors: nothing of prompts, alphas or files.

    rejected                    stops everything: it would be rejected everywhere
    exhausted                   the job waits its turn again, the server rests as long as it asks
    unavailable, lost, aborted  the job is done again by whoever is free; the server rests, longer each time, until it
                                answers a short call and still holds the same pair
    a fault of the server       the job is done again

A job that fails too often once it was admitted, or by a fault of the server, stops everything; and so does a time in
which no server does anything.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import lda_client
from lda_client import AsyncLdaClient, LdaClientError, RequestRejected, Timeout, pb
from lda_client.lab._errors import PairsDiffer, SettingsError, SurveyFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

    import grpc

    from lda_client import Tls

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

ATTEMPTS_MAX = 8
REST_S_MIN, REST_S_MAX = 0.2, 20.0
# Enough calls to keep every row of a server busy while others end.
ROWS_AHEAD = 2


@dataclass(eq=False)
class Endpoint:
    """A server of the fleet, or one address before several.

    Attributes:
        target: its address, as it was given.
        client: of it.
        replicas: how many servers answer there.
        pair: what it said of itself; None until it has answered.
        ready: whether it is given jobs.
        jobs: it has now.
        streams: of these, calls that were admitted.
        failures: since it last finished a job.
    """

    target: str
    client: AsyncLdaClient
    replicas: int = 1
    pair: pb.GetModelPairResponse | None = None
    ready: bool = False
    jobs: int = 0
    streams: int = 0
    failures: int = 0

    @property
    def rows(self) -> int:
        """Sequences that it decodes at once; each of its replicas as many as the one that was asked."""
        return self.replicas * max(1, self.pair.limits.max_running_sequences if self.pair else 1)

    @property
    def has_room(self) -> bool:
        """Whether it may be given one more job."""
        limit = self.pair.limits.max_requests_per_caller if self.pair else 0
        return self.ready and not (limit and self.jobs >= self.replicas * limit)


@asynccontextmanager
async def connected(
    target: str, credentials: Tls | grpc.ChannelCredentials | None, token: str | None
) -> AsyncIterator[Endpoint]:
    """A server by its target, connected. `3@envoy:8000` is one address before three. Raises SettingsError."""
    address, replicas = parse_target(target)
    async with AsyncLdaClient(address, credentials=credentials, token=token, timeout=Timeout()) as client:
        yield Endpoint(target, client, replicas)


def parse_target(target: str) -> tuple[str, int]:
    """Address of a target, and how many servers answer there. Raises SettingsError."""
    count, at, address = target.partition("@")
    if not at or not count.isdecimal():
        return target, 1
    if not int(count) or not address:
        raise SettingsError(f"target {target!r}: give N@HOST:PORT, where N servers stand behind one address.")
    return address, int(count)


@dataclass
class Fleet:
    """The servers of a survey.

    Attributes:
        endpoints: the servers.
        patience_s: how long to wait while no server does anything.
        tell: is told when a server goes away, asks to wait, or is back: `(event, target, why)`.
        fingerprint: of the pair; every server must hold it.
        admitted: jobs that a server has begun with.
        heard_at: when anything last moved.
    """

    endpoints: list[Endpoint]
    patience_s: float
    tell: Callable[[str, str, str], None]
    fingerprint: str = ""
    admitted: set[Any] = field(default_factory=set)
    heard_at: float = field(default_factory=time.monotonic)

    async def connect(self) -> pb.GetModelPairResponse:
        """Ask every server what it holds. One that is away is waited for later; at least one must answer.

        Raises:
            PairsDiffer: they hold different pairs.
            LdaClientError: none of them answers, or one rejects us.
        """
        answers = await asyncio.gather(*(each.client.model_pair() for each in self.endpoints), return_exceptions=True)
        for endpoint, answer in zip(self.endpoints, answers, strict=True):
            if isinstance(answer, pb.GetModelPairResponse):
                endpoint.pair, endpoint.ready = answer, True
            elif isinstance(answer, RequestRejected) or not isinstance(answer, LdaClientError):
                raise answer
            else:
                self.tell("away", endpoint.target, str(answer))
        pairs = {endpoint.target: endpoint.pair for endpoint in self.endpoints if endpoint.pair}
        if not pairs:
            raise next(answer for answer in answers if isinstance(answer, LdaClientError))
        self._require_one_pair(pairs)
        pair = next(iter(pairs.values()))
        self.fingerprint = pair.pair_fingerprint
        return pair

    def _require_one_pair(self, pairs: dict[str, pb.GetModelPairResponse]) -> None:
        fingerprints = {pair.pair_fingerprint for pair in pairs.values()}
        if len(fingerprints) > 1:
            named = ", ".join(
                f"{target} holds {pair.after.model_id} vs {pair.before.model_id} ({pair.pair_fingerprint})"
                for target, pair in pairs.items()
            )
            raise PairsDiffer(f"The servers hold different pairs: {named}. Survey each pair into a folder of its own.")

    def check(self, endpoint: Endpoint, fingerprint: str) -> None:
        """Raise PairsDiffer if a server holds another pair than the survey is of."""
        if fingerprint != self.fingerprint:
            raise PairsDiffer(
                f"{endpoint.target} now holds another pair ({fingerprint}) than this survey is of "
                f"({self.fingerprint}); leave it out, or let it serve the pair again."
            )

    @contextmanager
    def streaming(self, endpoint: Endpoint, job: Any) -> Iterator[None]:
        """While an admitted call is under way."""
        self.admitted.add(job)
        endpoint.streams += 1
        try:
            yield
        finally:
            endpoint.streams -= 1
            self.heard_at = time.monotonic()

    def calls_at_once(self, sequences: int) -> int:
        """Calls of so many sequences that keep every server busy."""
        return sum(
            each.replicas * max(2, ROWS_AHEAD * -(-each.rows // (each.replicas * sequences))) for each in self.endpoints
        )


class Work(Generic[JobT, ResultT]):
    """Jobs on the way through a fleet. Used once.

    Args:
        fleet: who does them.
        jobs: in the order in which they begin.
        perform: does one at a server.
        finish: takes the result of one.
        at_once: jobs that are done at the same time.
        may_begin: asked before each job, with how many are under way; once it says no, none begins until one has ended.
    """

    def __init__(
        self,
        fleet: Fleet,
        jobs: Iterable[JobT],
        perform: Callable[[Endpoint, JobT], Awaitable[ResultT]],
        finish: Callable[[JobT, ResultT], None],
        *,
        at_once: int,
        may_begin: Callable[[int], bool] = lambda running: True,
    ) -> None:
        self._fleet = fleet
        self._waiting = deque(jobs)
        self._perform = perform
        self._finish = finish
        self._at_once = at_once
        self._may_begin = may_begin
        self._attempts: dict[JobT, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0

    async def run(self) -> None:
        """Do the jobs. Raises what stopped them."""
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fleet.heard_at = time.monotonic()
        for endpoint in self._fleet.endpoints:
            if not endpoint.ready:
                self._start(self._rest(endpoint, None, REST_S_MIN))
        self._pump()
        try:
            await self._over
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _pump(self) -> None:
        """Begin what may begin now; notice the end."""
        if self._over.done():
            return
        while self._waiting and self._running < self._at_once:
            endpoint = self._pick()
            if endpoint is None or not self._may_begin(self._running):
                break
            self._running += 1
            endpoint.jobs += 1
            self._start(self._attempt(endpoint, self._waiting.popleft()))
        if not self._running and (not self._waiting or not self._may_begin(0)):
            self._over.set_result(None)

    def _pick(self) -> Endpoint | None:
        """The server with room that has the least to do for its size."""
        able = [endpoint for endpoint in self._fleet.endpoints if endpoint.has_room]
        return min(able, key=lambda endpoint: endpoint.jobs / endpoint.rows, default=None)

    def _start(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self, error: BaseException) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    async def _attempt(self, endpoint: Endpoint, job: JobT) -> None:
        try:
            result = await self._perform(endpoint, job)
            endpoint.failures = 0
            self._fleet.heard_at = time.monotonic()
            self._finish(job, result)
        except LdaClientError as error:
            self._failed(endpoint, job, error)
        except Exception as error:
            self._stop(error)
        finally:
            self._running -= 1
            endpoint.jobs -= 1
        self._pump()

    def _failed(self, endpoint: Endpoint, job: JobT, error: LdaClientError) -> None:
        if isinstance(error, RequestRejected):
            self._stop(error)
            return
        self._waiting.appendleft(job)
        if isinstance(error, lda_client.Exhausted):
            self._set_aside(endpoint, "asks to wait", error, probe=False)
            return
        is_away = isinstance(error, lda_client.Unavailable | lda_client.Aborted)
        self._attempts[job] = self._attempts.get(job, 0) + (not is_away or job in self._fleet.admitted)
        if self._attempts[job] >= ATTEMPTS_MAX:
            self._stop(
                SurveyFailed(f"One call failed {ATTEMPTS_MAX} times, the last time at {endpoint.target}: {error}")
            )
        elif is_away or isinstance(error, lda_client.DeadlineExceeded):
            self._set_aside(endpoint, "away", error, probe=True)

    def _set_aside(self, endpoint: Endpoint, event: str, error: LdaClientError, *, probe: bool) -> None:
        """Give a server no jobs for a while."""
        if not endpoint.ready:
            return
        endpoint.ready = False
        endpoint.failures += 1
        rest_s = error.retry_after_s or min(REST_S_MAX, REST_S_MIN * 2**endpoint.failures)
        if endpoint.failures == 1:
            self._fleet.tell(event, endpoint.target, str(error))
        self._start(self._rest(endpoint, error, rest_s, probe=probe))

    async def _rest(
        self, endpoint: Endpoint, error: LdaClientError | None, rest_s: float, *, probe: bool = True
    ) -> None:
        """Wait; then, if it was away, until it answers. Gives jobs to it again."""
        while True:
            if self._is_given_up(error):
                self._stop(
                    SurveyFailed(
                        f"No server did anything for {self._fleet.patience_s:g} s; last, {endpoint.target}: {error}"
                    )
                )
                return
            await asyncio.sleep(rest_s)
            if not probe:
                break
            try:
                endpoint.pair = await endpoint.client.model_pair()
                self._fleet.check(endpoint, endpoint.pair.pair_fingerprint)
                break
            except (RequestRejected, PairsDiffer) as refusal:
                self._stop(refusal)
                return
            except LdaClientError as still:
                error, rest_s = still, min(REST_S_MAX, 2 * rest_s)
        if probe:
            self._fleet.tell("back", endpoint.target, "")
        endpoint.ready = True
        self._pump()

    def _is_given_up(self, error: LdaClientError | None) -> bool:
        """Whether nothing has moved for too long: no job ended, no admitted call is under way."""
        if error is None or any(endpoint.streams for endpoint in self._fleet.endpoints):
            return False
        return time.monotonic() - self._fleet.heard_at > self._fleet.patience_s
