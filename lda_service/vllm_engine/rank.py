"""A vLLM worker that runs the pair: tells its model what to draw, and sends what is to be reported with the tokens.

Both of vLLM's model runners are served: they differ here in when logits are computed (one in `execute_model`, the other
in `sample_tokens`) and where the order of rows is read. Knows vLLM's workers; nothing of requests' meaning.
"""

from __future__ import annotations

import multiprocessing
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_pp_group, get_tp_group
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from lda_service.processes import end_with_parent
from lda_service.telemetry import configure_logging
from lda_service.vllm_engine.pair import SharedVocabulary
from lda_service.vllm_engine.step_rows import StepRows
from lda_service.vllm_engine.wire import KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lda_service.vllm_engine.wire import Answer


RANK_PROCESS = "VllmWorker"  # else the rank is in the worker's own process


class PairRank:
    """What is added to a vLLM worker class, which stands behind it in the order of bases."""

    model_config: Any
    model_runner: Any
    use_v2_model_runner: bool
    device: torch.device
    _rows: StepRows | None = None  # on the last pipeline stage

    def load_model(self, **options: Any) -> None:
        """Load both models; a rank ends with the process that started it, even while it waits for other ranks."""
        if multiprocessing.current_process().name.startswith(RANK_PROCESS):
            configure_logging(*self.model_config.hf_config.lda_log)
            end_with_parent()
        super().load_model(**options)  # type: ignore[misc]
        self._pair = self.model_runner.get_model()
        if get_pp_group().is_last_rank:
            config = self._pair.config
            vocabulary = SharedVocabulary.read(config.lda_shared, config.lda_tokenizer)
            self._rows = StepRows(vocabulary, self.device, reports=get_tp_group().rank_in_group == 0)
            self._pair.draw = self._rows.rehearse

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step. The V1 runner computes logits here, and its batch says whose row is whose."""
        if self._rows is None or not scheduler_output.total_num_scheduled_tokens:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        self._rows.begin(scheduler_output)
        rows, runner = self._rows, self.model_runner
        with self._drawing(lambda after, before: rows.draw(runner.input_batch.req_ids, after, before)):
            return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample what was drawn, and add what is reported. The V2 runner computes logits here."""
        state = self.model_runner.execute_model_state
        if self._rows is None or state is None:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        batch = state.input_batch if self.use_v2_model_runner else self.model_runner.input_batch
        order = list(batch.req_ids)
        with torch.inference_mode():
            self._rows.score(order, state.hidden_states, self._pair.both_logits)
        with self._drawing(partial(self._rows.draw, order)):
            output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        return _with_answers(output, self._rows.answers)

    @contextmanager
    def _drawing(self, draw: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Outside of real steps, vLLM's own runs rehearse."""
        outside, self._pair.draw = self._pair.draw, draw
        try:
            yield
        finally:
            self._pair.draw = outside


class GpuPairRank(PairRank, Worker):  # type: ignore[misc]
    """A rank on a CUDA device."""


class Answered(AsyncModelRunnerOutput):  # type: ignore[misc]
    """An output that is still being copied from the device, with the answers that go with it."""

    def __init__(self, pending: AsyncModelRunnerOutput, answers: dict[str, Answer]) -> None:
        self._pending = pending
        self._answers = answers

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the copy."""
        return _with_answers(self._pending.get_output(), self._answers)


def _with_answers(output: Any, answers: Any) -> Any:
    if isinstance(output, AsyncModelRunnerOutput):
        return Answered(output, answers)
    setattr(output, KEY, answers)
    return output
