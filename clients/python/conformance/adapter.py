"""Takes part in the conformance tests: one call per line from stdin, what came of it per line to stdout.

With --async the same calls go through `AsyncLdaClient`. The protocol is that of clients/conformance/README.md.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from lda_client import AsyncLdaClient, LdaClient, LdaClientError, Tls, pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.message import Message
    from lda_client import Completions

ClientT = TypeVar("ClientT", LdaClient, AsyncLdaClient)
REQUESTS: dict[str, type[Message]] = {
    "generate": pb.GenerateLDARequest,
    "generateBoth": pb.GenerateBothRequest,
    "score": pb.ScoreRequest,
    "complete": pb.GenerateLDARequest,
}
VERBS = {
    "generate": "generate",
    "generateBoth": "generate_both",
    "score": "score",
    "complete": "complete",
    "tokenizerCompat": "tokenizer_compat",
    "modelPair": "model_pair",
}


@dataclass
class Call:
    """One line of input, and what is known of its outcome so far."""

    line: dict[str, Any]
    events: list[Any] = field(default_factory=list)
    result: Any = None
    ended: str = "ok"
    error: dict[str, Any] | None = None

    @property
    def verb(self) -> str:
        """The verb, as the protocol spells it."""
        return str(self.line["verb"])

    @property
    def streams(self) -> bool:
        """Whether the verb gives events, rather than one answer."""
        return self.verb in ("generate", "generateBoth", "score")

    def begin(self, client: LdaClient | AsyncLdaClient) -> Any:
        """Call the verb: a stream, or the answer of a verb that is not streamed."""
        timeout_ms = self.line.get("timeoutMs")
        arguments = []
        if request := REQUESTS.get(self.verb):
            arguments.append(ParseDict(self.line.get("request", {}), request()))
        verb = getattr(client, VERBS[self.verb])
        return verb(*arguments, timeout_s=timeout_ms / 1000 if timeout_ms else None)

    def take(self, event: Message) -> bool:
        """Keep an event; whether it is time to leave."""
        self.events.append(MessageToDict(event))
        if len(self.events) != self.line.get("cancelAfter"):
            return False
        self.ended = "cancelled"
        return True

    def answer(self, value: Any) -> None:
        """Keep the answer of a verb that is not streamed."""
        self.result = completions(value) if self.verb == "complete" else MessageToDict(value)

    def fail(self, error: LdaClientError) -> None:
        """Keep an error."""
        self.ended, self.error = "error", describe(error)

    def report(self) -> dict[str, Any]:
        """The line of output."""
        outcome = {"ended": self.ended, "events": self.events, "result": self.result, "error": self.error}
        return {"id": self.line["id"], **outcome}


def completions(found: Completions) -> list[dict[str, Any]]:
    """The sequences in the order in which they finished."""
    return [
        {
            "sequenceIndex": item.sequence_index,
            "role": enum_name(pb.ModelRole.DESCRIPTOR, item.role),
            "text": item.text,
            "tokenIds": [token.id for token in item.tokens],
            "reason": enum_name(pb.FinishReason.DESCRIPTOR, item.finish_reason),
            "stopString": item.matched_stop if isinstance(item.matched_stop, str) else "",
            "seed": str(found.started.seed),
        }
        for item in found.as_finished
    ]


def enum_name(kind: EnumDescriptor, number: int) -> str | int:
    """The name of an enum value; the number of one that only a newer contract knows, as in JSON of protobuf."""
    known = kind.values_by_number.get(number)
    return known.name if known else number


def describe(error: LdaClientError) -> dict[str, Any]:
    """An error in the words of the protocol."""
    return {
        "class": type(error).__name__,
        "code": error.code.name if error.code else None,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "violations": [{"field": path, "description": text} for path, text in error.violations],
        "retryAfterS": error.retry_after_s,
    }


@contextmanager
def reported(call: Call) -> Iterator[None]:
    """Print what came of a call."""
    try:
        yield
    except LdaClientError as error:
        call.fail(error)
    except (KeyError, ParseError) as problem:
        _print({"id": call.line["id"], "unsupported": str(problem)})
        return
    _print(call.report())


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


class Clients(Generic[ClientT]):
    """The clients so far; calls to the same target with the same access share one, and so a channel."""

    def __init__(self, kind: type[ClientT]) -> None:
        self._kind: type[ClientT] = kind
        self._clients: dict[str, ClientT] = {}

    def of(self, call: Call) -> ClientT:
        """The client that makes this call."""
        target: str = call.line["target"]
        token, files = call.line.get("token"), call.line.get("tls")
        key = json.dumps([target, token, files], sort_keys=True)
        if key not in self._clients:
            tls = None if files is None else Tls(files.get("ca"), files.get("certificate"), files.get("key"))
            self._clients[key] = self._kind(target, token=token, credentials=tls)
        return self._clients[key]

    def all(self) -> Iterable[ClientT]:
        """Every client, to be closed."""
        return self._clients.values()


def run(lines: Iterable[str]) -> None:
    """Make the calls with the synchronous client."""
    clients = Clients(LdaClient)
    for text in lines:
        call = Call(json.loads(text))
        with reported(call):
            _make(call, clients.of(call))
    for client in clients.all():
        client.close()


def _make(call: Call, client: LdaClient) -> None:
    if not call.streams:
        call.answer(call.begin(client))
        return
    with call.begin(client) as stream:
        for event in stream:
            if call.take(event):
                return


async def run_async(lines: Iterable[str]) -> None:
    """Make the calls with the asyncio client."""
    clients, source = Clients(AsyncLdaClient), iter(lines)
    while text := await asyncio.to_thread(next, source, None):
        call = Call(json.loads(text))
        with reported(call):
            await _make_async(call, clients.of(call))
    for client in clients.all():
        await client.close()


async def _make_async(call: Call, client: AsyncLdaClient) -> None:
    if not call.streams:
        call.answer(await call.begin(client))
        return
    async with call.begin(client) as stream:
        async for event in stream:
            if call.take(event):
                return


if __name__ == "__main__":
    if "--async" in sys.argv[1:]:
        asyncio.run(run_async(sys.stdin))
    else:
        run(sys.stdin)
