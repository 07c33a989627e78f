"""A step as a CUDA graph, and its results on their way to the host. Without CUDA, the same calls run the step at once.

Knows streams, graphs and their memory; nothing of what a step does.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

logger = logging.getLogger(__name__)
WARM_UPS = 3


class Graphs:
    """Captures steps into one shared pool of memory, for as long as capturing works.

    The graphs of a pool never run at the same time, and leave nothing in it that is read after the next one's start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.works = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self.works else None

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """What replays the step; the step itself without CUDA, or if it cannot be captured, which the log says once.

        Runs the step a few times first: libraries set themselves up then.
        """
        if not self.works:
            return step
        try:
            return self._capture(step)
        except Exception as error:  # what a kernel that cannot be captured raises is its own choice
            logger.warning("no CUDA graph of the decode step, it runs kernel by kernel and slower: %s", error)
            self.works = False
            return step

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        gc.collect()  # a tensor freed by a collection in the middle of a capture would spoil it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            step()
        return graph.replay


class HostCopy:
    """The results of one step, copied to the host while the device goes on."""

    def __init__(self, results: Tensor) -> None:
        on_cuda = results.device.type == "cuda"
        self._copy = torch.empty(results.shape, dtype=results.dtype, pin_memory=on_cuda)
        self._copy.copy_(results, non_blocking=True)
        self._done = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(results.device))

    def read(self) -> list[list[float]]:
        """The results' rows; waits for the step."""
        if self._done is not None:
            self._done.synchronize()
        rows: list[list[float]] = self._copy.tolist()
        return rows
