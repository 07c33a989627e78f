"""Threads and memory of a process that does nothing but decode; a library leaves both to its user."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lda_service.engine.pair import Pair

logger = logging.getLogger(__name__)
SMALL_PARAMETERS = 20_000_000
# Parameters of glibc's mallopt (malloc.h), and the largest block it can be told to keep.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_KEPT = 32 << 20


def settle_process(pair: Pair) -> None:
    """Make the process one that decodes this pair."""
    choose_threads(pair)
    if pair.after.device.type == "cpu":
        keep_freed_memory()


def choose_threads(pair: Pair) -> None:
    """One thread for small models on the CPU: their steps are overhead, and waiting threads take the server's cores.

    `OMP_NUM_THREADS`, if set, stands.
    """
    largest = max(pair.info.after.parameter_count, pair.info.before.parameter_count)
    if pair.after.device.type == "cpu" and largest < SMALL_PARAMETERS and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    logger.info("decoding with %d CPU threads", torch.get_num_threads())


def keep_freed_memory() -> None:
    """Have glibc keep the large blocks that each step frees and the next one takes again.

    By default it returns them to the system, which clears every page anew: a step of 64 rows would spend a tenth of its
    time on that. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in (
        (M_MMAP_THRESHOLD, LARGEST_KEPT),
        (M_TRIM_THRESHOLD, 2**31 - 1),
        (M_TOP_PAD, LARGEST_KEPT),
    ):
        mallopt(parameter, value)
