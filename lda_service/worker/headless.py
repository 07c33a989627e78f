"""A worker without a server: a machine that holds ranks of a group. Knows the worker's client and signals."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

from lda_service.worker.client import WorkerClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from lda_service.config import Config
    from lda_service.pair_info import PairInfo

log = logging.getLogger(__name__)


async def run(config: Config, on_ready: Callable[[PairInfo], None]) -> None:
    """Keep the worker running until SIGTERM or SIGINT; it is started again when the group is over.

    Raises:
        StartupError: it cannot start.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    worker = WorkerClient(config)
    worker.start()
    ready, stopped = asyncio.ensure_future(worker.ready()), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            on_ready(ready.result())
        await stopped
    finally:
        ready.cancel()
        stopped.cancel()
        await worker.close()
        log.info("stopped")
