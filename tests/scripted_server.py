"""A server that plays scripts: the contract of lda.v1 without models, for tests of the client.

A script is a list of steps, played for each streaming call: an event to send, `HOLD` to wait until the call ends, or a
`Fail`. The server is a synchronous one, so that it runs beside clients of both kinds in one process, and records what
it was asked and what was cancelled. Nothing sleeps: tests wait for the event that they expect.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc

WAIT_S = 10.0
HOLD = object()


@dataclass(frozen=True)
class Fail:
    """End the call with a status and its `google.rpc` details."""

    code: grpc.StatusCode
    message: str = "no"
    reason: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    retry_after_s: float | None = None
    domain: str = "lda.v1"

    def packed(self) -> bytes:
        """The status as it travels in trailing metadata."""
        details = []
        if self.reason is not None:
            details.append(error_details_pb2.ErrorInfo(reason=self.reason, domain=self.domain, metadata=self.metadata))
        if self.violations:
            pairs = [{"field": path, "description": text} for path, text in self.violations]
            details.append(error_details_pb2.BadRequest(field_violations=pairs))
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            details.append(retry)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status.SerializeToString()


def started(**values):
    """The first event of a generation."""
    return {"started": pb.Started(**({"generation_id": "g-1", "seed": 7, "alpha": 1.5} | values))}


def delta(text, index=0, role=pb.MODEL_ROLE_AMPLIFIED, tokens=None):
    """New text of one sequence, by default of one token."""
    tokens = [pb.Token(id=len(text), piece=text.encode())] if tokens is None else tokens
    return {"delta": pb.TokenDelta(sequence_index=index, role=role, text=text, tokens=tokens)}


def finished(index=0, role=pb.MODEL_ROLE_AMPLIFIED, reason=pb.FINISH_REASON_EOS, **values):
    """The end of one sequence."""
    return {"finished": pb.Finished(sequence_index=index, role=role, reason=reason, **values)}


def compared_token(text, after=-1.0, before=-2.0, amplified=-0.5):
    """A token with diagnostics."""
    diagnostics = pb.TokenDiagnostics(
        after_logprob=after,
        before_logprob=before,
        amplified_logprob=amplified,
        after_rank=1,
        before_rank=2,
        amplified_rank=1,
        after_before_kl=0.25,
        novel_mass=0.125,
        critical_alpha=3.5,
        critical_token_id=9,
        critical_piece=b"no",
    )
    return pb.Token(id=5, piece=text.encode(), diagnostics=diagnostics)


HELLO = [started(), delta("Hel"), delta("lo"), finished(usage=pb.Usage(prompt_token_count=3, output_token_count=2))]


class ScriptedServer(lda_service_pb2_grpc.LdaServiceServicer):
    """The servicer and what it recorded.

    `script` is played by every streaming call, `scripts` first, one by one. `cancelled` is set when a call ends before
    its script does.
    """

    def __init__(self) -> None:
        self.script: list = HELLO
        self.scripts: list[list] = []
        self.pair = pb.GetModelPairResponse(has_chat_template=True)
        self.compat = pb.TokenizerCompatResponse(compatible=True)
        self.lookup_failure: Fail | None = None
        self.requests: list = []
        self.metadata: dict[str, str] = {}
        self.deadline_s: float | None = None
        self.sent = 0
        self.cancelled = threading.Event()
        self.target = ""

    def GenerateLDA(self, request, context):  # noqa: N802
        for step in self._play(request, context):
            yield pb.GenerateLDAResponse(**step)

    def GenerateBoth(self, request, context):  # noqa: N802
        for step in self._play(request, context):
            yield pb.GenerateBothResponse(**step)

    def Score(self, request, context):  # noqa: N802
        for step in self._play(request, context):
            yield pb.ScoreResponse(**step)

    def TokenizerCompat(self, request, context):  # noqa: N802
        self._look_up(request, context)
        return self.compat

    def GetModelPair(self, request, context):  # noqa: N802
        self._look_up(request, context)
        return self.pair

    def _look_up(self, request, context):
        self._record(request, context)
        if self.lookup_failure:
            self._abort(context, self.lookup_failure)

    def _record(self, request, context):
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.deadline_s = context.time_remaining()

    def _play(self, request, context):
        self._record(request, context)
        over, complete = threading.Event(), threading.Event()

        def ended():
            over.set()
            if not complete.is_set():
                self.cancelled.set()

        context.add_callback(ended)
        for step in self.scripts.pop(0) if self.scripts else self.script:
            if step is HOLD:
                over.wait(WAIT_S)
                return
            if isinstance(step, Fail):
                complete.set()
                self._abort(context, step)
            self.sent += 1
            yield step
        complete.set()

    def _abort(self, context, failure):
        context.set_trailing_metadata((("grpc-status-details-bin", failure.packed()),))
        context.abort(failure.code, failure.message)

    def last(self, kind):
        """The last request of this kind."""
        return [request for request in self.requests if isinstance(request, kind)][-1]

    def wait_cancelled(self) -> bool:
        """Whether a call was cancelled, now or soon."""
        return self.cancelled.wait(WAIT_S)


@contextlib.contextmanager
def scripted_server():
    """A running `ScriptedServer` on a free port; its address is `target`."""
    servicer = ScriptedServer()
    pool = ThreadPoolExecutor(max_workers=8)
    server = grpc.server(pool)
    lda_service_pb2_grpc.add_LdaServiceServicer_to_server(servicer, server)
    servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield servicer
    finally:
        server.stop(None).wait()
        pool.shutdown()


def free_target() -> str:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
