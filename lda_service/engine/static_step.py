"""One decode step of fixed shape over static buffers: both models, amplification, draw, and the next step's input.

Nothing in it asks the device for a value or has a shape that depends on one, so that a CUDA graph can be made of it:
see `cuda_graph`. The drawn ids are the next step's ids without a way through the host. Knows buffers and both runners;
what to put into the buffers is `static_decoder`'s business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lda_service.engine.kv_cache import Group, PassInputs
from lda_service.engine.paged_attention import PagedBatch
from lda_service.engine.sampling import RowSampling

if TYPE_CHECKING:
    from torch import Tensor

    from lda_service.engine.lockstep import PairRunner
    from lda_service.engine.paged_attention import PagedKernel
    from lda_service.engine.sampling import Sampler


class Bucket(NamedTuple):
    """What a static step is made for.

    Attributes:
        rows: rows it computes; those too many stand for nobody.
        context: positions of the longest row, its new one included.
        candidates: see `Sampler.draw_capturable`.
        needs: which models run: after, before.
    """

    rows: int
    context: int
    candidates: int
    needs: tuple[bool, bool]


class StaticStep:
    """A step of one bucket.

    Args:
        models: both runners; the last row of their slot map is nobody's.
        sampler: what draws.
        bucket: its shape.
        kernel: for attention; None: rows gather their context.
    """

    def __init__(self, models: PairRunner, sampler: Sampler, bucket: Bucket, kernel: PagedKernel | None) -> None:
        self.models, self.sampler, self.bucket = models, sampler, bucket
        self.nobody = len(models.slot_map.slots) - 1
        rows, device = bucket.rows, models.device
        self.ids, self.positions = (torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.rows = torch.full((rows,), self.nobody, dtype=torch.int64, device=device)
        floats = (torch.zeros(rows, device=device) for _ in range(5))
        alpha, temperature, top_p, min_p, plausibility = floats
        top_k, keys = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.settings = RowSampling(alpha, temperature, top_k, top_p, min_p, plausibility, keys, self.positions[:, 0])
        # ids, log-probabilities, whether sound, whether the candidates were enough; float64 holds every id
        self.results = torch.zeros(4, rows, dtype=torch.float64, device=device)
        self.paged = None
        if kernel is not None:
            scratch_page = int(models.slot_map.slots[-1, 0]) // kernel.page_tokens
            self.paged = PagedBatch(kernel, rows, bucket.context, scratch_page, self.positions)
        self.side_stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and all(bucket.needs):
            self.side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def load(self, ids: list[int], positions: list[int], rows: list[int], settings: RowSampling) -> None:
        """Fill the first rows of the buffers; the others stand for nobody: greedy, at position 0, in nobody's slot.

        Args:
            ids: each row's last token.
            positions: where that stands.
            rows: of the slot map.
            settings: of these rows; its positions are not looked at.
        """
        count = len(ids)
        for buffer, values, fill in (
            (self.ids[:, 0], ids, 0),
            (self.positions[:, 0], positions, 0),
            (self.rows, rows, self.nobody),
        ):
            buffer.copy_(torch.tensor(values + [fill] * (self.bucket.rows - count)))
        for buffer, column in zip(self.settings[:-1], settings[:-1], strict=True):
            buffer[:count] = column
            buffer[count:] = 0

    def run(self) -> None:
        """Run the rows' last tokens, draw the next ones, and stand ready for the step after."""
        after, before = self._logits()
        settings = self.settings._replace(positions=self.positions[:, 0] + 1)
        drawn, enough = self.sampler.draw_capturable(after, before, settings, self.bucket.candidates)
        self.results.copy_(torch.stack([column.double() for column in (*drawn, enough)]))
        self.ids.copy_(drawn.tokens[:, None])
        self.positions.add_(1)

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Both models' logits, shape (rows, vocabulary); one that is not needed stands in as equal to the other."""
        runners = [r for r, needed in zip(self.models.native, self.bucket.needs, strict=True) if needed]
        if self.side_stream is None:
            ran = [runner.decode_static(self._inputs(), self.paged) for runner in runners]
            return ran[0], ran[-1]
        stream = torch.cuda.current_stream(self.models.device)
        self.side_stream.wait_stream(stream)
        after = runners[0].decode_static(self._inputs(), self.paged)
        with torch.cuda.stream(self.side_stream):
            before = runners[1].decode_static(self._inputs(), self.paged)
        # What the side stream allocates is reused by it alone, and not before it waits for this stream again.
        stream.wait_stream(self.side_stream)
        return after, before

    def _inputs(self) -> PassInputs:
        """For one model: slots and masks are made while it runs, and two streams must not share them."""
        everyone = (Group(0, self.bucket.rows, 0),)
        return PassInputs(
            self.ids, self.positions, self.models.slot_map.slots, self.rows, self.bucket.context, everyone
        )
