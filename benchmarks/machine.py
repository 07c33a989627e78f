"""What the machine can do, measured in the same run as the engines: memory read rate, matrix rates, and its names."""

from __future__ import annotations

import os
import platform
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from benchmarks import child

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = (1, 4, 16, 64, 256)
READ_BYTES = 1 << 29
SIZE = 2048
PEAK_ROWS = 512


class Machine(child.Measured):
    """A `child.Handler` that measures the machine itself."""

    def versions(self) -> dict[str, str]:
        """Names and counts that a reader needs beside the figures."""
        return child.versions("torch", "transformers") | {
            "cpu": cpu_name(),
            "cores": str(os.cpu_count()),
            "threads": str(torch.get_num_threads()),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "system": f"{platform.system()} {platform.machine()}",
        }

    @torch.inference_mode()
    def measure(self) -> dict[str, Any]:
        """Bytes/s, FLOP/s at the peak, and FLOP/s of a plain linear layer by dtype and rows."""
        rates = {name: {str(rows): _linear_rate(rows, dtype) for rows in ROWS} for name, dtype in DTYPES.items()}
        plain = max(rate for by_rows in rates.values() for rate in by_rows.values())
        return {"bytes_per_s": _read_rate(), "flops_per_s": max(plain, _peak()), "linear_flops_per_s": rates}


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _best(work: Callable[[], object], repetitions: int = 3) -> float:
    """Seconds of the fastest of some runs after one that is not counted."""
    work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _read_rate() -> float:
    """Bytes/s of summing memory far larger than any cache, every page of it touched before."""
    memory = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _best(memory.sum, 5)


def _linear_rate(rows: int, dtype: torch.dtype) -> float:
    """FLOP/s of linear layers whose weights are not in the cache."""
    weights = [torch.randn(SIZE, SIZE).to(dtype) for _ in range(8)]
    x = torch.randn(rows, SIZE).to(dtype)
    return 2 * rows * SIZE * SIZE * len(weights) / _best(lambda: [linear(x, w) for w in weights])


def _peak() -> float:
    """FLOP/s of the best large product: plain, and through a prepacked weight where torch offers that."""
    products: list[Callable[[], object] | None] = []
    for dtype in DTYPES.values():
        x, w = torch.randn(PEAK_ROWS, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
        products += [partial(linear, x, w), _packed(x, w)]
    return max(2 * PEAK_ROWS * SIZE * SIZE / _best(product) for product in products if product)


def _packed(x: torch.Tensor, w: torch.Tensor) -> Callable[[], object] | None:
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0])
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):  # private operators: another torch may not have them
        return None
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


if __name__ == "__main__":
    child.serve(Machine)
