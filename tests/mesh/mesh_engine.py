"""The fake engine with a queue, for replicas: at most `max_running_sequences` requests are admitted at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import fake_engine

from lda_service.engine.request import Load

GATE = "MESH_LOADING_GATE"


@dataclass
class QueueingEngine(fake_engine.FakeEngine):
    rows: int = 64

    def load(self):
        admitted = sum(each.admitted for each in self.running.values())
        return Load(running_sequences=admitted)

    def _advance(self, running):
        if not running.admitted and self.load().running_sequences >= self.rows:
            return []
        return super()._advance(running)


def load(config):
    """The factory given to the worker. A named pipe in the environment holds it up until somebody opens it."""
    if gate := os.environ.get(GATE):
        Path(gate).read_bytes()
    _, pair = fake_engine.load(config)
    return QueueingEngine(rows=config.engine.max_running_sequences), pair
