"""The worker of a machine that only holds ranks: all work comes to these from the leader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lda_service.engine.request import Load
from lda_service.errors import InternalError
from lda_service.vllm_engine import group
from lda_service.vllm_engine.start import explained, prepare

if TYPE_CHECKING:
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    from lda_service.config import Config
    from lda_service.engine.request import Event, GenerationRequest, ScoreRequest
    from lda_service.pair_info import PairInfo


class Follower:
    """An engine that is never asked for anything, and holds this machine's ranks while it lives."""

    has_work = False

    def __init__(self, executor: MultiprocExecutor) -> None:
        self._executor = executor

    def submit(self, request: GenerationRequest | ScoreRequest) -> None:
        """Never called: no server stands before a follower."""
        raise InternalError(f"{request.request_id} was sent to a follower")

    def cancel(self, request_id: str) -> None:
        """Nothing to forget."""

    def step(self) -> list[Event]:
        """Nothing to do."""
        return []

    def load(self) -> Load:
        """The leader knows."""
        return Load()

    def warm_up(self) -> None:
        """The leader does."""


def load_follower(config: Config) -> tuple[Follower, PairInfo]:
    """Join the group and start this machine's ranks; the worker's factory where NODE_RANK is not 0.

    Raises:
        StartupError: the pair cannot be loaded here, or the group will not have this machine.
    """
    args, facts = prepare(config)
    from vllm.plugins import load_general_plugins
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    with explained():
        group.follow(config.vllm, group.digest(config, facts))
        load_general_plugins()
        executor = MultiprocExecutor(args.create_engine_config(headless=True), monitor_workers=False)
    group.end_with_ranks([worker.proc.sentinel for worker in executor.workers])
    return Follower(executor), facts.info
