"""How many CPU threads a pair is worth, in a process that does nothing else; a library leaves that to its user."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lda_service.engine.pair import Pair

logger = logging.getLogger(__name__)
SMALL_PARAMETERS = 20_000_000


def choose_threads(pair: Pair) -> None:
    """One thread for small models on the CPU: their steps are overhead, and waiting threads take the server's cores.

    `OMP_NUM_THREADS`, if set, stands.
    """
    largest = max(pair.info.after.parameter_count, pair.info.before.parameter_count)
    if pair.after.device.type == "cpu" and largest < SMALL_PARAMETERS and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    logger.info("decoding with %d CPU threads", torch.get_num_threads())
