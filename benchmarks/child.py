"""The measured side of a measurement: a process that loads once and then answers one line of JSON for each it gets.

Only the standard library is imported: this runs in the environments of the peers too. What libraries print goes to
stderr; answers have a channel of their own.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import traceback
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Handler(Protocol):
    """An engine under measurement. Its other methods are the operations it offers, by name, with JSON arguments."""

    def versions(self) -> dict[str, str]:
        """What was measured, to the patch level."""

    def close(self) -> None:
        """Stop what this engine started; called when stdin ends."""


class Measured:
    """A handler that starts nothing it must stop."""

    def close(self) -> None:
        """See `Handler`."""


def serve(load: Callable[..., Handler]) -> None:
    """Load with the keyword arguments in `argv[1]`, report versions, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(work: Callable[[], Any]) -> bool:
        try:
            message = {"result": work()}
        except Exception as error:
            traceback.print_exc()
            message = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(message) + "\n")
        answers.flush()
        return "result" in message

    handler: list[Handler] = []

    def start() -> dict[str, str]:
        handler.append(load(**json.loads(sys.argv[1])))
        return handler[0].versions()

    if not answer(start):
        return
    for line in sys.stdin:
        request = json.loads(line)
        operation = getattr(handler[0], request.pop("operation"))
        answer(functools.partial(operation, **request))
    handler[0].close()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, and Python's own."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def prompt_ids(length: int, vocabulary: int, seed: int) -> list[int]:
    """A prompt nobody has cached: another one for each seed. The first ids are special and left out."""
    import random

    return random.Random(seed).choices(range(8, vocabulary), k=length)
