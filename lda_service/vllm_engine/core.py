"""vLLM's engine core in this process: scheduler, KV cache manager, and the executor behind which the ranks run.

The only module that calls vLLM's engine. Knows sequences as prompt ids, what to ask of the ranks and a length; nothing
of requests, text or alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.request import Request

from lda_service.vllm_engine.wire import KEY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm import EngineArgs

    from lda_service.vllm_engine.wire import Answer, Ask


@dataclass(frozen=True, slots=True)
class Step:
    """What came of a step, by sequence: those whose first positions were run, new tokens, answers, and who ended."""

    started: dict[str, int]  # with how many positions of its prompt it found in the cache
    tokens: dict[str, int]
    answers: dict[str, Any]
    ended: frozenset[str]


class Core:
    """Runs sequences. A sequence ends by itself at its length, or by `abort`.

    Args:
        args: vLLM's own settings.
    """

    def __init__(self, args: EngineArgs) -> None:
        self.config = args.create_engine_config()
        self._core = EngineCore(self.config, Executor.get_class(self.config), log_stats=False)
        self._scheduler: Any = self._core.scheduler
        self._known: set[str] = set()  # started and not ended
        self._found: dict[str, int] = {}
        self._answers: dict[str, Answer] = {}
        self.preemptions = 0
        # What comes with a step's tokens is read as it passes, whichever scheduler class vLLM chose.
        self._update = self._scheduler.update_from_output
        self._scheduler.update_from_output = self._note

    @property
    def rank_sentinels(self) -> list[int]:
        """What becomes readable when a rank's process on this machine ends; empty if the rank is this process."""
        return [worker.proc.sentinel for worker in getattr(self._core.model_executor, "workers", ())]

    @property
    def pages(self) -> tuple[int, int]:
        """Free and all blocks of the KV cache; each holds both models' keys and values."""
        return (
            self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            self.config.cache_config.num_gpu_blocks,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything; the one after the last sequence tells the ranks that it has ended."""
        return bool(self._scheduler.has_requests() or self._core.batch_queue)

    def add(self, sequence_id: str, prompt_ids: Iterable[int], ask: Ask, length: int, *, whole: bool = False) -> None:
        """Queue a sequence of `length` new tokens. `whole`: run all of its prompt, whatever the cache holds."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            extra_args={KEY: ask},
            skip_reading_prefix_cache=whole,
        )
        hasher = self._core.request_block_hasher
        self._core.add_request(Request(sequence_id, list(prompt_ids), params, None, block_hasher=hasher))

    def abort(self, sequence_ids: Iterable[str]) -> None:
        """Forget sequences: what they hold is free for the next step. Unknown ids are ignored."""
        ids = list(sequence_ids)
        self._known.difference_update(ids)
        self._core.abort_requests(ids)

    def step(self) -> Step:
        """Schedule, run, and take what came back."""
        self._found, self._answers = {}, {}
        outputs, executed = self._core.step_fn()
        self._core.post_step(executed)
        found = outputs[0].outputs if outputs and 0 in outputs else ()
        ended = frozenset(one.request_id for one in found if one.finished)
        self._known -= ended
        tokens = {one.request_id: one.new_token_ids[0] for one in found if one.new_token_ids}
        return Step(self._found, tokens, self._answers, ended)

    def _note(self, scheduled: Any, output: Any) -> Any:
        cached = scheduled.scheduled_cached_reqs
        new = {one.req_id: one.num_computed_tokens for one in scheduled.scheduled_new_reqs}
        self.preemptions += len(cached.resumed_req_ids) + len(self._known & new.keys())
        self._found = {i: count for i, count in new.items() if i not in self._known}
        self._known.update(new)
        self._answers = getattr(output, KEY, {})
        return self._update(scheduled, output)

    def shutdown(self) -> None:
        """End the ranks."""
        self._core.shutdown()
