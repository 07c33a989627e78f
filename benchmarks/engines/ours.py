"""This project's engine, driven as the worker drives it: submit, step, until there is no work."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import child
from benchmarks.workloads import ALPHA, TEMPERATURE
from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import Branch, GenerationRequest, Role, Sampling, SequenceDelta, Stopping
from lda_service.engine.threads import settle_process

if TYPE_CHECKING:
    from lda_service.engine.request import Event

MAX_STEPS_TO_FIRST_TOKEN = 1000


class Ours(child.Measured):
    """The engine over a pair."""

    def __init__(self, after: str, before: str, dtype: str) -> None:
        pair = load_pair(PairConfig(after, before, "cpu", dtype))
        settle_process(pair)
        self.engine = Engine(pair, EngineConfig())
        self.engine.warm_up()
        self.vocabulary = pair.vocabulary_size
        self._requests = 0

    def versions(self) -> dict[str, str]:
        """See `child.Handler`."""
        threads = {"threads": str(torch.get_num_threads()), "dtype": self.engine.pair.info.after.dtype}
        return child.versions("lda-service", "torch", "transformers") | threads

    def run(self, rows: int, prompt: int, new: int, top_p: float, seed: int, calls: int = 1) -> dict[str, Any]:
        """Decode the workload, its rows spread over `calls` requests of the same prompt.

        Returns tokens, seconds, and `step_ms`: the median of the steps in which all rows decoded.
        """
        start = time.perf_counter()
        for _ in range(calls):
            self._submit(rows // calls, prompt, new, top_p, seed)
        tokens, steps = 0, []
        while self.engine.has_work:
            began = time.perf_counter()
            got = _tokens(self.engine.step())
            tokens += got
            if got == rows:
                steps.append(time.perf_counter() - began)
        seconds = time.perf_counter() - start
        # The first full step takes the prompt's logits and runs no model.
        step = statistics.median(steps[1:]) if len(steps) > 1 else None
        return {"tokens": tokens, "rows": rows, "seconds": seconds, "step_ms": step and step * 1e3}

    def memory(self, rows: int, prompt: int, new: int, seed: int) -> dict[str, int]:
        """KV slots held at the fullest moment, in tokens of one model, and what one prompt and `rows` suffixes need."""
        self._submit(rows, prompt, new, 1.0, seed)
        most = 0
        while self.engine.has_work:
            self.engine.step()
            load = self.engine.load()
            most = max(most, load.pages_total - load.pages_free)
        return {"held_tokens": most * self.engine.scheduler.pool.page_tokens, "needed_tokens": prompt + rows * new}

    def first_token(self, rows: int, prompt: int, seed: int) -> dict[str, int]:
        """Steps until a request's first token: on an idle engine, and while `rows` others decode."""
        idle = self._steps_to_first_token(prompt, seed)
        self._submit(rows, prompt, 256, 1.0, seed + 1)
        while self.engine.load().running_sequences < rows:
            self.engine.step()
        busy = self._steps_to_first_token(prompt, seed + 2)
        assert self.engine.load().running_sequences == rows, "the neighbours ended too early to be a load"
        for number in range(self._requests):
            self.engine.cancel(f"bench-{number}")
        return {"idle_steps": idle, "busy_steps": busy}

    def _steps_to_first_token(self, prompt: int, seed: int) -> int:
        request_id = self._submit(1, prompt, 64, 1.0, seed)
        for steps in range(1, MAX_STEPS_TO_FIRST_TOKEN):
            if any(isinstance(e, SequenceDelta) and e.request_id == request_id for e in self.engine.step()):
                self.engine.cancel(request_id)
                return steps
        raise AssertionError("no first token")

    def _submit(self, rows: int, prompt: int, new: int, top_p: float, seed: int) -> str:
        request_id = f"bench-{self._requests}"
        self._requests += 1
        request = GenerationRequest(
            request_id,
            tuple(child.prompt_ids(prompt, self.vocabulary, seed)),
            (Branch(Role.AMPLIFIED, ALPHA),),
            rows,
            Sampling(temperature=TEMPERATURE, top_p=top_p, seed=self._requests),
            replace(Stopping(), max_new_tokens=new, ignore_eos=True),
        )
        self.engine.submit(request)
        return request_id


def _tokens(events: list[Event]) -> int:
    return sum(len(event.tokens) for event in events if isinstance(event, SequenceDelta))


if __name__ == "__main__":
    child.serve(Ours)
