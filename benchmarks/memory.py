"""How much memory engines' processes may want, so that they do not push one another out of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.workloads import PairShape

# Libraries, a KV cache, work space.
PROCESS_BYTES = 3 << 30
WEIGHT_BYTES = 4  # a peer may run in float32


def process_bytes(shape: PairShape | None, models: int) -> int:
    """A generous guess for a process that holds so many models; None stands for the small bundled pair."""
    parameters = shape.layer_parameters + 2 * shape.head_parameters if shape else 0
    return PROCESS_BYTES + models * WEIGHT_BYTES * parameters


def available_bytes() -> int:
    """Memory that can be had without pushing anything out."""
    try:
        with open("/proc/meminfo") as lines:
            kibibytes = next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        return int(kibibytes) << 10
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
