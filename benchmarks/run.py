"""Run workloads and studies: whose turn it is, which processes live, what is recorded. Knows no engine from inside.

What is recorded is plain data for `results.json`; `report` makes it readable.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import click

from benchmarks import limits, memory
from benchmarks.figures import Summary, WrongTokenCount, best, interleaved, pair_equivalent, tokens_per_s
from benchmarks.processes import DISTURBED, Child, EngineFailed, EngineMissing
from benchmarks.workloads import BUNDLED, PAIRS, SINGLE_MODEL, Workload

if TYPE_CHECKING:
    from pathlib import Path

WARM_UP = {"prompt": 16, "new": 4, "top_p": 1.0, "seed": 0}
STREAM = Workload("stream", "bench-190m", 64, 256, 64)
MACHINE_TRIALS = 5
FAILURES = (EngineFailed, EngineMissing, WrongTokenCount)


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure, and where things lie.

    `budget_s`: an engine that has decoded for so long in a workload has no further repetitions; the report shows how
    many it had. `dtypes`: engine to dtype, where not chosen by the rule.
    """

    repetitions: int
    budget_s: float
    logs: Path
    dtypes: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Turn:
    """An engine's record in one workload."""

    dtype: str
    versions: dict[str, str] = field(default_factory=dict)
    tokens_per_s: list[float] = field(default_factory=list)
    runs: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""


def measure_machine(logs: Path) -> dict[str, Any]:
    """Names and rates. What was measured beside a busy neighbour is measured again, and the best of all is kept."""
    machine = Child("machine", {}, logs / "machine.log")
    measured: dict[str, Any] = {}
    for _ in range(MACHINE_TRIALS):
        rates, others = machine.ask_watched("measure")
        measured = best(measured, rates) if measured else rates
        if others < DISTURBED:
            break
    machine.close()
    return {"names": machine.versions, "others_cores": others, **measured}


class Bench:
    """The processes of a run and the machine they share."""

    def __init__(self, options: Options, models: dict[str, dict[str, str]]) -> None:
        self.options = options
        self.models = models
        self._children: dict[tuple[str, ...], Child] = {}
        self.machine = measure_machine(options.logs)

    def close(self) -> None:
        """End every process."""
        for child in self._children.values():
            child.close()
        self._children.clear()

    def workload(self, workload: Workload, engines: list[str]) -> dict[str, Any]:
        """All repetitions of all engines, interleaved; what failed or is missing says so in its note."""
        turns = {engine: Turn(self._dtype(engine, workload)) for engine in engines}
        for number, engine in enumerate(interleaved(engines, self.options.repetitions)):
            turn = turns[engine]
            if turn.note or turn.seconds > self.options.budget_s:
                continue
            try:
                self._take_turn(engine, workload, turn, seed=fresh_seed(workload.name, number))
            except FAILURES as error:
                turn.note = str(error)
            last = f"{turn.tokens_per_s[-1]:.1f} tokens/s" if turn.tokens_per_s else ""
            click.echo(f"  {workload.name} {engine} ({turn.dtype}): {turn.note or last}")
        return {
            **asdict(workload),
            "title": workload.title,
            "limit_tokens_per_s": self._limit(workload),
            "machine": self.machine,
            "engines": {engine: _record(turn) for engine, turn in turns.items()},
        }

    def memory(self) -> dict[str, Any]:
        """The study of this name."""
        answer = self._child("ours", "bench-190m", "").ask("memory", rows=64, prompt=1024, new=32, seed=1)
        return {**answer, "ratio": answer["held_tokens"] / answer["needed_tokens"]}

    def first_token(self) -> dict[str, Any]:
        """The study of this name."""
        answer = self._child("ours", "bench-190m", "").ask("first_token", rows=32, prompt=256, seed=1)
        return {**answer, "later": answer["busy_steps"] - answer["idle_steps"]}

    def stream(self) -> dict[str, Any]:
        """The service's rate over the engine's, for one call of 64 sequences and for 64 calls of one."""
        return {f"calls-{calls}": self._stream(calls) for calls in (1, STREAM.rows)}

    def _stream(self, calls: int) -> dict[str, Any]:
        rates: dict[str, list[float]] = {"ours": [], "stream": []}
        for number, engine in enumerate(interleaved(list(rates), self.options.repetitions)):
            child = self._warm(self._child(engine, STREAM.pair, ""), STREAM)
            answer = child.ask("run", **_shape(STREAM), seed=fresh_seed(f"stream {calls}", number), calls=calls)
            rates[engine].append(tokens_per_s(STREAM, answer))
            click.echo(f"  stream, {calls} calls, {engine}: {rates[engine][-1]:.1f} tokens/s")
        summaries = {engine: Summary.of(values) for engine, values in rates.items()}
        ratio = summaries["stream"].median / summaries["ours"].median
        return {"ratio": ratio, **{name: asdict(each) for name, each in summaries.items()}, "tokens_per_s": rates}

    def _take_turn(self, engine: str, workload: Workload, turn: Turn, seed: int) -> None:
        roles = ("after", "before") if engine in SINGLE_MODEL else ("",)
        rates = []
        for role in roles:
            child = self._warm(self._child(engine, workload.pair, role, turn.dtype), workload)
            answer, others = child.ask_watched("run", **_shape(workload), seed=seed)
            answer["others_cores"] = others
            answer["partial"] = answer["rows"] < workload.rows
            turn.versions = child.versions
            turn.runs.append({"model": role or "pair", "seed": seed, **answer})
            turn.seconds += answer["seconds"]
            rates.append(tokens_per_s(workload, answer))
        turn.tokens_per_s.append(pair_equivalent(*rates) if len(rates) > 1 else rates[0])

    def _child(self, engine: str, pair: str, role: str, dtype: str = "") -> Child:
        """The engine's process, started if it is not there; others make room if they must."""
        dtype = dtype or self.options.dtypes.get(engine, "auto")
        key = (engine, pair, role, dtype)
        if key not in self._children:
            self._make_room(pair, 1 if role else 2)
            folders = self.models[pair]
            models = {"model": folders[role]} if role else folders
            log = self.options.logs / f"{'-'.join(filter(None, key))}.log"
            began = time.perf_counter()
            child = Child(engine, {**models, "dtype": dtype}, log)
            click.echo(f"  started {' '.join(filter(None, key))} in {time.perf_counter() - began:.0f} s")
            self._children[key] = child
        # The least recently used is first.
        self._children[key] = self._children.pop(key)
        return self._children[key]

    def _make_room(self, pair: str, models: int) -> None:
        """End processes, the longest unused first, until one more fits."""
        needed = memory.process_bytes(PAIRS.get(pair), models)
        while self._children and memory.available_bytes() < needed:
            self._children.pop(next(iter(self._children))).close()

    def _warm(self, child: Child, workload: Workload) -> Child:
        """Before its first turn at so many rows, an engine may pay for what it pays once."""
        if workload.rows not in child.warm_rows:
            child.ask("run", rows=workload.rows, **WARM_UP)
            child.warm_rows.add(workload.rows)
        return child

    def _dtype(self, engine: str, workload: Workload) -> str:
        if engine in self.options.dtypes:
            return self.options.dtypes[engine]
        if engine == "ours" or workload.pair == BUNDLED:
            return "auto"
        return limits.faster_dtype(engine, workload, self.machine["linear_flops_per_s"])

    def _limit(self, workload: Workload) -> float | None:
        shape = PAIRS.get(workload.pair)
        if shape is None:
            return None
        return limits.limit_tokens_per_s(shape, workload, limits.capability(self.machine))


def fresh_seed(name: str, number: int) -> int:
    """Of a prompt that no other measurement uses: engines that know a prompt again would skip its prefill."""
    return (zlib.crc32(name.encode()) << 16) + number


def _shape(workload: Workload) -> dict[str, Any]:
    return {"rows": workload.rows, "prompt": workload.prompt, "new": workload.new, "top_p": workload.top_p}


def _record(turn: Turn) -> dict[str, Any]:
    summary = asdict(Summary.of(turn.tokens_per_s)) if turn.tokens_per_s else None
    return {"summary": summary, **asdict(turn)}
