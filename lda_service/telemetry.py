"""Logging: one line per event, on stderr, with the ids that tie it to a call.

Knows how a line looks, as text or as a JSON object, and which ids a line carries where they are known. Does not know
what is logged; prompts never are unless an operator asks for it, and generated text never is.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

LINE = "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"
JSON_FIELDS = "%(levelname)s %(processName)s %(name)s %(message)s"
JSON_NAMES = {"levelname": "level", "processName": "process", "name": "logger"}

# What ties lines together, by the name of its field. A call runs in a context of its own.
_fields: dict[str, ContextVar[str]] = {}


def log_field(name: str) -> ContextVar[str]:
    """A variable whose value, where it is set, stands in every JSON line of its context under this name."""
    return _fields.setdefault(name, ContextVar(name, default=""))


def set_log_fields(**values: str) -> None:
    """From here on, lines of this context carry these values."""
    for name, value in values.items():
        log_field(name).set(value)


class ContextFields(logging.Filter):
    """Adds what is known of the context; what a record says itself (`extra`) stands."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record passes."""
        for name, variable in _fields.items():
            if (value := variable.get()) and not hasattr(record, name):
                setattr(record, name, value)
        return True


def configure_logging(log_format: str = "text", log_level: str = "info") -> None:
    """Send the records of this process to stderr. Called once in the server, in the worker and in each rank."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_json_formatter())
        handler.addFilter(ContextFields())
        logging.captureWarnings(True)
    else:
        handler.setFormatter(logging.Formatter(LINE))
    logging.basicConfig(level=log_level.upper(), handlers=[handler])
    if log_level == "info":
        logging.getLogger("vllm").setLevel(logging.WARNING)  # it tells some sixty things at each start


def _json_formatter() -> logging.Formatter:
    """Imported here: a library user who never logs JSON does not load it."""
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(JSON_FIELDS, rename_fields=JSON_NAMES, timestamp="time")
