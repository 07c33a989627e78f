"""A rank on a CPU. A module of its own: vLLM's CPU worker need not be importable where there is a GPU."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker

from lda_service.vllm_engine.rank import PairRank


class CpuPairRank(PairRank, CPUWorker):  # type: ignore[misc]
    """See `PairRank`."""

    def compile_or_warm_up_model(self) -> Any:
        """Make what the V1 runner receives from the stage before, which on a CPU it only does when it compiles."""
        runner = self.model_runner
        if not get_pp_group().is_first_rank and getattr(runner, "intermediate_tensors", self) is None:
            runner.intermediate_tensors = self._pair.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return super().compile_or_warm_up_model()
