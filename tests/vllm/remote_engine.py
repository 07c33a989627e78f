"""A vLLM engine in a process of its own, called like the engine itself.

One process can hold one engine, and vLLM changes transformers' classes in its process: so the oracles, which are
transformers' own and the native engine, run in the process of the tests, and vLLM never does.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from lda_service.config import Config, EngineConfig, PairConfig, VllmConfig

FAKE_TRITON = Path(__file__).parent / "fake_triton"
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(FAKE_TRITON)}
CALLS = ("submit", "step", "cancel", "load", "warm_up")


class RemoteEngine:
    """See the module. Reads and calls are those of `VllmEngine`, and wait for its answer.

    Args:
        pair: the two folders.
        arguments: `VLLM_ARGS`.
        parallel: fields of `VllmConfig`.
        environment: variables of the process, beside the tests' own.
        is_patient: whether time passes only when a test says so.
        limits: fields of `EngineConfig`.
    """

    def __init__(
        self, pair, arguments=None, parallel=None, environment=None, *, dtype="float32", is_patient=False, **limits
    ):
        config = Config(
            PairConfig(str(pair[0]), str(pair[1]), dtype=dtype),
            EngineConfig(**{"max_running_sequences": 8, **limits}),
            backend="vllm",
            vllm=VllmConfig(**(parallel or {}), arguments=arguments or {}),
        )
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, config, environment or {}, is_patient))
        self._process.start()
        theirs.close()
        self.info, shared_ids, stop_ids = self._receive()
        self.pair = SimpleNamespace(shared_ids=shared_ids, stop_ids=stop_ids)
        self.clock = Clock(self)

    def __getattr__(self, name):
        """The calls of an engine."""
        if name not in CALLS:
            raise AttributeError(name)
        return lambda *args: self._call(name, *args)

    @property
    def has_work(self):
        """Whether a step would do anything."""
        return self._call("has_work")

    def mutate(self, name):
        """Break the engine in one of the ways of `MUTATIONS`; None mends it."""
        self._call("mutate", name)

    def check_integrity(self):
        """Nothing is held when nothing runs; vLLM keeps one block for itself."""
        load = self.load()
        assert (load.running_sequences, load.waiting_requests) == (0, 0)
        assert load.pages_free == load.pages_total - 1

    def close(self):
        """End the engine and its ranks."""
        self._pipe.close()
        self._process.join(30)
        assert self._process.exitcode == 0

    def _call(self, name, *args):
        self._pipe.send((name, args))
        return self._receive()

    def _receive(self):
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Clock:
    """The engine's clock, which a test may move."""

    def __init__(self, engine):
        self._engine = engine

    @property
    def now(self):
        return self._engine._call("read_now")

    @now.setter
    def now(self, value):
        self._engine._call("set_now", value)


# The other process ---------------------------------------------------------------------------------------------------


def serve(pipe, config, environment, is_patient):
    """Load the engine, answer calls until the other end closes, and end."""
    # One thread: the models are tiny, and waiting threads only take the cores from each other.
    os.environ.update(environment, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    sys.path[:0] = [path for path in (environment.get("PYTHONPATH"),) if path]
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        desk = Desk(config, is_patient)
    except Exception as error:
        pipe.send(error)
        os._exit(0)
    pipe.send(desk.greeting)
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            os._exit(0)  # ranks end with the process that started them
        try:
            pipe.send(desk.call(name, args))
        except Exception as error:
            pipe.send(error)


class Desk:
    """Takes calls for the engine, and what is done to it beside."""

    def __init__(self, config, is_patient):
        from lda_service.vllm_engine.engine import load_engine

        self.engine, info = load_engine(config)
        self.engine.warm_up()
        self.now = 100.0
        if is_patient:
            self.engine._clock = lambda: self.now
        facts = self.engine._facts
        self.greeting = info, facts.shared_ids, facts.stop_ids
        self.kept = None

    def call(self, name, args):
        if name in CALLS:
            return getattr(self.engine, name)(*args)
        return getattr(self, name)(*args)

    def has_work(self):
        return self.engine.has_work

    def read_now(self):
        return self.now

    def set_now(self, value):
        self.now = value

    def mutate(self, name):
        from lda_service.vllm_engine.step_rows import StepRows

        self.kept = self.kept or (StepRows.draw, StepRows._settings)
        StepRows.draw, StepRows._settings = self.kept
        if name is not None:
            MUTATIONS[name](StepRows)


def rotate_rows(kind):
    """Rows take their settings from the row below: what a batch that moved without being followed would do."""
    draw = kind.draw
    kind.draw = lambda self, order, after, before: draw(self, order[1:] + order[:1], after, before)


def keep_columns(kind):
    """Settings stay those of the first batch of a size."""
    settings, known = kind._settings, {}

    def stale(self, order, specs):
        return known.setdefault(len(order), settings(self, order, specs))

    kind._settings = stale


def forget_alpha(kind):
    """Every row is drawn at the first row's alpha."""
    settings = kind._settings

    def flat(self, order, specs):
        found = settings(self, order, specs)
        return found._replace(alpha=found.alpha[:1].expand_as(found.alpha))

    kind._settings = flat


MUTATIONS = {"rows are rotated": rotate_rows, "columns are stale": keep_columns, "alpha is one": forget_alpha}
