"""What a caller learns when something goes wrong: code, reason, field, and nothing that belongs into the log."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import pytest_asyncio
from fake_engine import SECRET
from google.rpc import error_details_pb2
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from server_harness import failure, outcome, serving

from lda_service import errors
from lda_service.config import EngineConfig
from lda_service.rpc.status import INTERNAL_TEXT, status_of

PROTO = Path(__file__).parents[1] / "proto/lda/v1/lda_service.proto"
DOCUMENTED = {
    reason: code for code, reason in re.findall(r"// ([A-Z_]+)\. [^=]*?ERROR_REASON_([A-Z_]+) = ", PROTO.read_text())
}
HEADER_BYTES_MAX = 8192


def leaves(kind=errors.LdaError):
    """The classes at the bottom of the tree."""
    kinds = kind.__subclasses__()
    return [leaf for each in kinds for leaf in leaves(each)] if kinds else [kind]


SENT = [kind for kind in leaves() if not issubclass(kind, errors.StartupError)] + [errors.PairIncompatible]


def unpack(status, kind):
    """The details of one kind."""
    return [kind.FromString(each.value) for each in status.details if each.Is(kind.DESCRIPTOR)]


def test_every_reason_is_documented_and_used():
    """The proto's ErrorReason and the error classes name the same reasons."""
    names = {name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert set(DOCUMENTED) == names == {kind.reason for kind in SENT}


@pytest.mark.parametrize("kind", SENT)
def test_every_error_maps_to_its_documented_code(kind):
    """Each class is sent with the code that the proto documents for its reason, with an ErrorInfo of our domain."""
    status = status_of(kind("What is wrong.", metadata={"limit": "3"}), "r-1")
    (info,) = unpack(status, error_details_pb2.ErrorInfo)
    assert errors.LdaError.__module__ == kind.__module__
    assert (info.reason, info.domain) == (kind.reason, "lda.v1")
    assert DOCUMENTED[info.reason] == kind.code
    assert dict(info.metadata) == ({"request_id": "r-1"} if kind.code == "INTERNAL" else {"limit": "3"})


@pytest.mark.parametrize("kind", SENT)
def test_details_always_arrive(kind):
    """However long the text and however many the fields, the packed status fits into the headers."""
    violations = [(f"output.score_alphas[{index}]", "must be finite " * 50) for index in range(500)]
    status = status_of(kind("x" * 100_000, field="y" * 100_000, metadata={"k": "z" * 100_000}), "r", violations)
    assert len(status.SerializeToString()) * 4 / 3 + len(status.message) < HEADER_BYTES_MAX
    assert unpack(status, error_details_pb2.BadRequest)[0].field_violations


@pytest.mark.parametrize(
    "kind", [errors.Loading, errors.Draining, errors.QueueFull, errors.CallerLimit, errors.WorkerDied]
)
def test_temporary_errors_say_when_to_retry(kind):
    """A refusal that another attempt may overcome carries RetryInfo."""
    (retry,) = unpack(status_of(kind("Later.")), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 1.0
    (retry,) = unpack(status_of(kind("Later.", retry_after_s=2.5)), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.5


def test_quota_and_precondition_details():
    """A full queue names the quota, an impossible precondition names itself."""
    (quota,) = unpack(status_of(errors.QueueFull("Full.")), error_details_pb2.QuotaFailure)
    assert quota.violations[0].subject == "queue"
    (failed,) = unpack(status_of(errors.NoChatTemplate("No template.")), error_details_pb2.PreconditionFailure)
    assert failed.violations[0].type == "NO_CHAT_TEMPLATE"


def test_internal_text_is_fixed():
    """The text of an internal error stays in the log."""
    assert status_of(errors.InternalError(SECRET), "r-9").message == INTERNAL_TEXT


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client():
    """A client of a server with low limits."""
    async with serving(engine=EngineConfig(max_new_tokens=100, max_sequences_per_request=8, max_alpha=20.0)) as both:
        yield both[1]


def request(**fields):
    """A good request, except for what `fields` spoils."""
    return pb.GenerateLDARequest(**{"prompt": pb.Prompt(text="hi"), **fields})


INVALID = [
    (request(alpha=math.nan), ["alpha"], "alpha must be finite and between -100 and 100."),
    (request(alpha=math.inf), ["alpha"], "alpha must be finite and between -100 and 100."),
    (request(alpha=200), ["alpha"], "alpha must be between -100 and 100."),
    (pb.GenerateLDARequest(), ["prompt"], "prompt is required."),
    (request(prompt=pb.Prompt()), ["prompt.form"], "prompt.form: exactly one form is required."),
    (request(prompt=pb.Prompt(text="")), ["prompt.text"], "prompt.text must be at least 1 characters."),
    (
        request(prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user"), pb.ChatMessage()]))),
        ["prompt.chat.messages[1].role"],
        "prompt.chat.messages[1].role must be at least 1 characters.",
    ),
    (request(sampling=pb.Sampling(top_p=0)), ["sampling.top_p"], "sampling.top_p must be above 0 and at most 1."),
    (
        request(sampling=pb.Sampling(temperature=0), num_sequences=2),
        [""],
        "greedy decoding draws one sequence.",
    ),
    (
        request(stopping=pb.Stopping(max_new_tokens=0)),
        ["stopping.max_new_tokens"],
        "stopping.max_new_tokens must be between 1 and 131072.",
    ),
    (
        request(stopping=pb.Stopping(stop_strings=["a", "a"])),
        ["stopping.stop_strings"],
        "stopping.stop_strings must contain unique items.",
    ),
    (
        request(output=pb.OutputOptions(score_alphas=[0, math.inf])),
        ["output.score_alphas[1]"],
        "output.score_alphas[1] must be finite and between -100 and 100.",
    ),
    (
        request(alpha=math.nan, output=pb.OutputOptions(top_candidates=51)),
        ["alpha", "output.top_candidates"],
        "alpha must be finite and between -100 and 100. (1 more field is at fault.)",
    ),
    (
        request(stopping=pb.Stopping(min_new_tokens=81)),
        ["stopping.min_new_tokens"],
        "stopping.min_new_tokens must not be above max_new_tokens, which is 80.",
    ),
]


@pytest.mark.parametrize(("message", "fields", "sentence"), INVALID, ids=[each[2] for each in INVALID])
@pytest.mark.asyncio(loop_scope="module")
async def test_validation_names_the_field(client, message, fields, sentence):
    """A bad field is answered with its path and what is allowed, before headers."""
    refused = await failure(client.lda.GenerateLDA(message, timeout=30))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "VALIDATION_FAILED")
    assert (refused.fields, refused.message) == (fields, sentence)
    assert "x-generation-id" not in refused.initial
    assert refused.trailing["x-request-id"]


LIMITED = [
    (request(alpha=21), "alpha", "20"),
    (request(num_sequences=9), "num_sequences", "8"),
    (request(stopping=pb.Stopping(max_new_tokens=101)), "stopping.max_new_tokens", "100"),
    (request(output=pb.OutputOptions(score_alphas=[1, 50])), "output.score_alphas[1]", "20"),
]


@pytest.mark.parametrize(("message", "field", "limit"), LIMITED, ids=[each[1] for each in LIMITED])
@pytest.mark.asyncio(loop_scope="module")
async def test_server_limits_name_field_and_limit(client, message, field, limit):
    """A legal value above a limit of this server is refused with the field and the limit."""
    refused = await failure(client.lda.GenerateLDA(message, timeout=30))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "LIMIT_EXCEEDED")
    assert (refused.metadata, refused.fields) == ({"field": field, "limit": limit}, [field])


@pytest.mark.asyncio(loop_scope="module")
async def test_chat_as_continuation_is_refused(client):
    """Only text or ids can be scored."""
    chat = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")]))
    refused = await failure(
        client.lda.Score(pb.ScoreRequest(prompt=pb.Prompt(text="p"), continuation=chat), timeout=30)
    )
    assert (refused.code, refused.fields) == ("INVALID_ARGUMENT", ["continuation"])


@pytest.mark.asyncio(loop_scope="module")
async def test_engine_refusals_keep_their_metadata(client):
    """What the engine finds wrong crosses the process border whole."""
    refused = await failure(client.generate("long"))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "CONTEXT_EXCEEDED")
    assert refused.metadata == {"prompt_tokens": "4", "max_new_tokens": "8", "limit": "9"}


@pytest.mark.parametrize("prompt", ["renderer fault", "crash"])
@pytest.mark.asyncio(loop_scope="module")
async def test_no_exception_text_leaves_the_process(client, prompt):
    """A fault of ours, in the server or in the worker, is INTERNAL with a fixed text and the request id."""
    watch = client.watch()
    assert (await watch.read()).status == 1
    failed = await failure(client.generate(prompt, metadata=(("x-request-id", "mine"),)))
    assert (failed.code, failed.reason, failed.message) == ("INTERNAL", "INTERNAL", INTERNAL_TEXT)
    assert failed.metadata == {"request_id": "mine"}
    assert SECRET not in repr(failed)
    if prompt == "crash":
        assert [(await watch.read()).status for _ in range(2)] == [2, 1], "a fresh worker took over"
    watch.cancel()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("prompt", ["oom", "memory"])
async def test_out_of_memory_costs_the_running_requests_only(client, prompt):
    """Out of memory, a device's or the machine's, ends what runs with RESOURCE_EXHAUSTED; the worker lives on."""
    neighbour = client.generate("hold")
    await neighbour.read()
    for call in (client.generate(prompt), neighbour):
        failed = await failure(call)
        assert (failed.code, failed.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    assert await client.health_of() == "SERVING"
    assert await outcome(client.generate()) == "OK"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("method", ["GenerateLDA", "TokenizerCompat"])
async def test_bytes_that_are_no_message_are_the_callers_fault(client, method):
    """What cannot be read is INVALID_ARGUMENT with a reason, not a fault of the server."""
    kind = client.channel.unary_stream if method == "GenerateLDA" else client.channel.unary_unary
    refused = await failure(kind(f"/lda.v1.LdaService/{method}")(b"\xff\xff\xff", timeout=30))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "VALIDATION_FAILED")
    assert "cannot be read" in refused.message


@pytest.mark.asyncio(loop_scope="module")
async def test_hostile_request_ids_are_replaced(client):
    """An id that could spoil a log line is not taken over."""
    refused = await failure(client.generate("full", metadata=(("x-request-id", "x" * 129),)))
    assert re.fullmatch(r"r-[0-9a-f]{16}", refused.trailing["x-request-id"])
