"""A survey over many servers as discrete events: clients, Envoys with bounded loads, servers that fail.

Fed with measured times by `replicas`. What is simulated: a client has one processor, which begins calls and takes in
their rollouts one after the other; an Envoy sends a call to its prompt's server on the ring or, if that has more than
its share of the open calls, to another one, as `RING_HASH` with `hash_balance_factor` does; a server runs as many calls
side by side as its rows hold and lets the others wait; when it dies, its calls are begun again elsewhere. What is not:
the network, Envoy's processor, and that a server with few rows in use decodes each of them faster.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

RING_ENTRIES_MIN = 1024  # Envoy's minimum_ring_size
ROUNDS_AHEAD = 2  # of the survey: as many calls wait as run


@dataclass(frozen=True)
class Scenario:
    """What is simulated. Times are in seconds.

    Attributes:
        replicas: servers.
        service_s: samples of the time that a call takes on a server all of whose rows are in use.
        tokens_per_call: new tokens of a call.
        slots: calls that a server runs side by side.
        calls_per_slot: length of the survey.
        prompts: of the survey; a call belongs to one.
        balance_factor: open calls that a server may have, as a share of the mean; infinite binds every prompt.
        clients: processes that share the prompts, each with an Envoy of its own.
        client_s_per_call: processor time of a client for a call, its tokens included.
        mtbf_s: mean time between failures of one server.
        restart_s: from a failure until the server is back.
        seed: of everything random.
    """

    replicas: int
    service_s: Sequence[float]
    tokens_per_call: float
    slots: int = 4
    calls_per_slot: int = 40
    prompts: int = 200
    balance_factor: float = 1.05
    clients: int = 1
    client_s_per_call: float = 0.0
    mtbf_s: float = math.inf
    restart_s: float = 60.0
    seed: int = 0

    @property
    def calls(self) -> int:
        """Of the whole survey."""
        return self.replicas * self.slots * self.calls_per_slot


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        seconds: from the first call to the last rollout.
        tokens_per_s: over the whole survey, its end included.
        steady_tokens_per_s: between a tenth and nine tenths of the calls.
        balance: calls of the busiest server over the mean.
        servers_per_prompt: that a prompt's calls were sent to.
        latency_s: of every call, from its beginning until its rollouts are kept; ascending.
        client_busy: share of the time in which a client's processor worked.
        failures: of servers.
        cut_calls: that failures cut off and that were begun again.
    """

    seconds: float
    tokens_per_s: float
    steady_tokens_per_s: float
    balance: float
    servers_per_prompt: float
    latency_s: NDArray[np.float64]
    client_busy: float
    failures: int
    cut_calls: int


@dataclass(eq=False)
class _Call:
    client: int
    prompt: int
    begun_s: float


@dataclass(eq=False)
class _Server:
    number: int
    life: int = 0  # grows with every failure: what ends in an earlier life has no effect
    running: set[_Call] = field(default_factory=set)
    waiting: deque[_Call] = field(default_factory=deque)
    done: int = 0


class Ring:
    """Which server is a prompt's: Envoy's ring, on which every server has equally many places."""

    def __init__(self, servers: int, rng: np.random.Generator) -> None:
        places = math.ceil(RING_ENTRIES_MIN / servers)
        positions = rng.random(servers * places)
        order = np.argsort(positions)
        self._positions = positions[order]
        self._owners = np.repeat(np.arange(servers), places)[order]

    def home(self, position: float, alive: NDArray[np.bool_]) -> int:
        """The first living server from a position on."""
        place = int(np.searchsorted(self._positions, position))
        while not alive[owner := int(self._owners[place % len(self._owners)])]:
            place += 1
        return owner


class Envoy:
    """Chooses a server for a call by its own open calls: consistent hashing with bounded loads."""

    def __init__(self, ring: Ring, alive: NDArray[np.bool_], balance_factor: float) -> None:
        self.active = np.zeros(len(alive), dtype=int)
        self.asked: set[tuple[int, int]] = set()  # prompts and the servers that had them
        self._ring, self._alive, self._factor = ring, alive, balance_factor
        self._orders: dict[int, tuple[float, NDArray[np.int64]]] = {}

    def begin(self, prompt: int) -> int:
        """The server for one more call: the prompt's, or in an order of the prompt's own the first with room."""
        position, others = self._order(prompt)
        chosen = self._ring.home(position, self._alive)
        if self.active[chosen] > (bound := self._bound()):
            has_room = self._alive[others] & (self.active[others] <= bound)
            chosen = int(others[has_room.argmax()]) if has_room.any() else chosen
        self.asked.add((prompt, chosen))
        self.active[chosen] += 1
        return chosen

    def end(self, server: int) -> None:
        """One call fewer."""
        self.active[server] -= 1

    def _bound(self) -> float:
        """Open calls above which a server has more than its share."""
        if math.isinf(self._factor):
            return math.inf
        share = math.ceil((int(self.active.sum()) + 1) * self._factor) / int(self._alive.sum())
        return max(1, math.ceil(share))

    def _order(self, prompt: int) -> tuple[float, NDArray[np.int64]]:
        if prompt not in self._orders:
            rng = np.random.default_rng(prompt)
            self._orders[prompt] = (rng.random(), rng.permutation(len(self._alive)))
        return self._orders[prompt]


class _Simulation:
    """One survey. Used once."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._rng = np.random.default_rng(scenario.seed)
        self._service_s = np.asarray(scenario.service_s, dtype=float)
        self._servers = [_Server(number) for number in range(scenario.replicas)]
        self._alive = np.ones(scenario.replicas, dtype=bool)
        ring = Ring(scenario.replicas, self._rng)
        self._envoys = [Envoy(ring, self._alive, scenario.balance_factor) for _ in range(scenario.clients)]
        self._free_s = [0.0] * scenario.clients  # when a client's processor has done what it has
        self._todo = [deque(self._prompts_of(client)) for client in range(scenario.clients)]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()
        self._kept_s: list[float] = []
        self._latency_s: list[float] = []
        self._failures = self._cut = 0

    def run(self) -> Outcome:
        scenario = self._scenario
        for client in range(scenario.clients):
            for _ in range(math.ceil(ROUNDS_AHEAD * scenario.slots * scenario.replicas / scenario.clients)):
                self._begin_next(client, 0.0)
        if math.isfinite(scenario.mtbf_s):
            for server in self._servers:
                self._fail_later(server, 0.0)
        while len(self._kept_s) < scenario.calls:
            now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments, now)
        return self._outcome()

    def _prompts_of(self, client: int) -> list[int]:
        """A client's calls in the order of the survey: all its prompts in turn."""
        scenario = self._scenario
        own = range(client, scenario.prompts, scenario.clients)
        calls = len(range(client, scenario.calls, scenario.clients))
        return [own[number % len(own)] for number in range(calls)]

    def _at(self, time_s: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), act, arguments))

    def _begin_next(self, client: int, now: float) -> None:
        if self._todo[client]:
            self._send(_Call(client, self._todo[client].popleft(), now), now)

    def _send(self, call: _Call, now: float) -> None:
        server = self._servers[self._envoys[call.client].begin(call.prompt)]
        server.waiting.append(call)
        self._fill(server, now)

    def _fill(self, server: _Server, now: float) -> None:
        while server.waiting and len(server.running) < self._scenario.slots:
            call = server.waiting.popleft()
            server.running.add(call)
            self._at(now + float(self._rng.choice(self._service_s)), self._end, server, server.life, call)

    def _end(self, server: _Server, life: int, call: _Call, now: float) -> None:
        if life != server.life:
            return
        server.running.remove(call)
        server.done += 1
        self._envoys[call.client].end(server.number)
        self._fill(server, now)
        self._free_s[call.client] = max(now, self._free_s[call.client]) + self._scenario.client_s_per_call
        self._at(self._free_s[call.client], self._keep, call)

    def _keep(self, call: _Call, now: float) -> None:
        self._kept_s.append(now)
        self._latency_s.append(now - call.begun_s)
        self._begin_next(call.client, now)

    def _fail_later(self, server: _Server, now: float) -> None:
        self._at(now + float(self._rng.exponential(self._scenario.mtbf_s)), self._fail, server)

    def _fail(self, server: _Server, now: float) -> None:
        if self._alive.sum() == 1:  # somebody must be left to go on
            return self._fail_later(server, now)
        lost = [*server.running, *server.waiting]
        server.running.clear()
        server.waiting.clear()
        self._alive[server.number] = False
        server.life += 1
        self._failures += 1
        self._cut += len(lost)
        for call in lost:
            self._envoys[call.client].end(server.number)
        for call in lost:
            self._send(call, now)
        return self._at(now + self._scenario.restart_s, self._revive, server)

    def _revive(self, server: _Server, now: float) -> None:
        self._alive[server.number] = True
        self._fail_later(server, now)

    def _outcome(self) -> Outcome:
        scenario, kept = self._scenario, self._kept_s
        tenth = max(1, len(kept) // 10)
        steady = (len(kept) - 2 * tenth) * scenario.tokens_per_call / (kept[-tenth] - kept[tenth])
        done = np.array([server.done for server in self._servers])
        return Outcome(
            seconds=kept[-1],
            tokens_per_s=scenario.calls * scenario.tokens_per_call / kept[-1],
            steady_tokens_per_s=steady,
            balance=float(done.max() / done.mean()),
            servers_per_prompt=sum(len(envoy.asked) for envoy in self._envoys) / scenario.prompts,
            latency_s=np.sort(self._latency_s),
            client_busy=scenario.calls * scenario.client_s_per_call / scenario.clients / kept[-1],
            failures=self._failures,
            cut_calls=self._cut,
        )


def simulate(scenario: Scenario) -> Outcome:
    """Run a survey to its end."""
    return _Simulation(scenario).run()
