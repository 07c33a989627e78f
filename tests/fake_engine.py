"""A deterministic engine without models, which runs in the real worker process: for tests of operations.

The prompt says how to behave. By default every sequence gets one letter per step until `max_new_tokens`.

    hold            admitted, then silent until cancelled
    wide, broad     a token is 64 KiB, or 1 KiB, of text
    cancelled? ID   silent until that request was cancelled
    full, long      refused on submission
    crash, oom, memory
                    the next step raises
    preempted       counts as one more preemption
    exit            the process ends in the next step
    stuck           the next step never ends
    clock           a token at every 30th of a second, its text the monotonic time in nanoseconds

Requests wait while as many sequences run as `max_running_sequences` allows.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from lda_service.engine.request import (
    Admitted,
    Diagnostics,
    FinishReason,
    GenerationRequest,
    Load,
    ScoreBlock,
    ScoreRequest,
    SequenceDelta,
    SequenceFinished,
    TokenRecord,
)
from lda_service.errors import ContextExceeded, ModelNotFound, QueueFull
from lda_service.pair_info import ModelInfo, PairInfo
from lda_service.vocabulary import CompatibilityReport
from lda_service.worker.messages import sequences_of

SECRET = "secret path /models/x"
WIDE = "w" * 65536
TICK_S, CLOCK_STEP_S = 1 / 30, 0.005
PAGES = 1024
DIAGNOSTICS = Diagnostics(
    after_logprob=-1.0,
    before_logprob=-2.0,
    amplified_logprob=-0.5,
    after_rank=1,
    before_rank=2,
    amplified_rank=1,
    after_before_kl=0.25,
    novel_mass=0.1,
    critical_alpha=None,
    critical_token_id=None,
    critical_piece=b"",
)


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


FAULTS = {"crash": RuntimeError, "oom": OutOfMemoryError, "memory": MemoryError}


class FakePrompter:
    """A token is a byte."""

    has_chat_template = True

    def text(self, text):
        if text == "renderer fault":
            raise RuntimeError(SECRET)
        return tuple(text.encode())

    continuation = text

    def chat(self, messages, continue_final_message=False):
        return tuple("".join(content for _, content in messages).encode())

    def rendered(self, messages):
        return "".join(f"<{role}>{content}" for role, content in messages)

    def decode(self, ids):
        return bytes(ids).decode()


@dataclass
class Running:
    request: GenerationRequest | ScoreRequest
    behaviour: str
    admitted: bool = False
    tokens: int = 0
    due: float = 0.0  # when a clock ticks next


@dataclass
class FakeEngine:
    rows: int = 64
    running: dict[str, Running] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    known_prompts: set[tuple[int, ...]] = field(default_factory=set)
    reused_prompt_tokens: int = 0
    preemptions: int = 0

    @property
    def has_work(self):
        return bool(self.running)

    def warm_up(self):
        pass

    def load(self):
        held, waiting = self.rows_taken, len(self.running) - self.admitted
        return Load(held, waiting, PAGES - held, PAGES, self.reused_prompt_tokens, self.preemptions)

    @property
    def admitted(self):
        return sum(running.admitted for running in self.running.values())

    @property
    def rows_taken(self):
        return sum(sequences_of(running.request) for running in self.running.values() if running.admitted)

    def submit(self, request):
        behaviour = _behaviour(request)
        if behaviour == "full":
            raise QueueFull("The queue is full.", metadata={"depth": "4", "capacity": "4"}, retry_after_s=2.0)
        if behaviour == "long":
            raise ContextExceeded("Too long.", metadata={"prompt_tokens": "4", "max_new_tokens": "8", "limit": "9"})
        self.reused_prompt_tokens += len(request.prompt_ids) if request.prompt_ids in self.known_prompts else 0
        self.known_prompts.add(request.prompt_ids)
        self.preemptions += behaviour == "preempted"
        self.running[request.request_id] = Running(request, behaviour)

    def cancel(self, request_id):
        if self.running.pop(request_id, None):
            self.cancelled.append(request_id)

    def step(self):
        has_clock = any(running.behaviour == "clock" for running in self.running.values())
        time.sleep(CLOCK_STEP_S if has_clock else 0.001)
        return [event for running in list(self.running.values()) for event in self._advance(running)]

    def _advance(self, running):
        request, behaviour = running.request, running.behaviour
        if not running.admitted:
            if self.rows_taken and self.rows_taken + sequences_of(request) > self.rows:
                return []
            running.admitted = True
            # Clocks tick out of step with each other.
            running.due = time.monotonic() + TICK_S * (len(self.running) * 0.618 % 1)
            return [Admitted(request.request_id)]
        if behaviour == "exit":
            os._exit(3)
        if behaviour == "clock":
            if time.monotonic() < running.due:
                return []
            running.due += TICK_S
        if behaviour == "stuck":
            time.sleep(3600)
        if behaviour in FAULTS:
            raise FAULTS[behaviour](SECRET)
        question, _, request_id = behaviour.partition(" ")
        if behaviour == "hold" or (question == "cancelled?" and request_id not in self.cancelled):
            return []
        if isinstance(request, ScoreRequest):
            return self._score(request)
        return self._decode(running, _text(behaviour, running.tokens))

    def _decode(self, running, text):
        request = running.request
        keys = [(branch.role, index) for branch in request.branches for index in range(request.num_sequences)]
        token = TokenRecord(ord(text[0]), text.encode(), -0.5, DIAGNOSTICS if request.output.diagnostics else None)
        running.tokens += 1
        events = [SequenceDelta(request.request_id, *key, text, (token,)) for key in keys]
        if running.tokens == request.stopping.max_new_tokens:
            del self.running[request.request_id]
            scores = tuple(-alpha for alpha in request.output.score_alphas)
            reason = FinishReason.MAX_TOKENS
            events += [
                SequenceFinished(request.request_id, *key, reason, running.tokens, alpha_scores=scores) for key in keys
            ]
        return events

    def _score(self, request):
        del self.running[request.request_id]
        tokens = [TokenRecord(each, bytes([each]), None, DIAGNOSTICS) for each in request.continuation_ids]
        total = len(tokens)
        return [
            ScoreBlock(
                request.request_id,
                offset,
                tuple(tokens[offset : offset + 4]),
                total,
                is_last=offset + 4 >= total,
                alpha_scores=request.score_alphas if offset + 4 >= total else (),
            )
            for offset in range(0, total, 4)
        ]


def _text(behaviour, index):
    """The text of a token."""
    if behaviour == "clock":
        return f"{time.monotonic_ns()} "
    return {"wide": WIDE, "broad": WIDE[:1024]}.get(behaviour, chr(ord("a") + index % 26))


def _behaviour(request):
    return bytes(request.prompt_ids).decode()


def load(config):
    """The factory given to the worker."""
    model = ModelInfo("fake", "r1", "float32", 256, "Fake", 7, 512)
    report = CompatibilityReport(
        compatible=True,
        after_vocab_size=256,
        before_vocab_size=256,
        vocabularies_equal=True,
        conflicts=(),
        conflict_count=0,
        after_vocab_sha256="0" * 64,
        before_vocab_sha256="0" * 64,
        shared_id_count=256,
        after_only_ids=(),
        before_only_ids=(),
        after_padded_row_count=0,
        before_padded_row_count=0,
        special_token_differences=(),
        after_eos_ids=(0,),
        before_eos_ids=(0,),
        chat_templates_equal=True,
        verdict="The two vocabularies are equal.",
    )
    return FakeEngine(config.engine.max_running_sequences), PairInfo(model, model, "cpu", "f1", True, report)


def load_missing(config):
    """A factory for a pair that is not there."""
    raise ModelNotFound("No such model; check MODEL_AFTER_ID.")


def load_broken(config):
    """A factory with a fault."""
    raise RuntimeError(SECRET)


def load_and_die(config):
    """A factory whose process is killed."""
    os.kill(os.getpid(), 9)
