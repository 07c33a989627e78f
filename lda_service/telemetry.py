"""Logging: one line per event, on stderr, with the ids that tie it to a call.

Knows how a line looks. Does not know what is logged; prompts and generated text never are.
"""

from __future__ import annotations

import logging

LINE = "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"


def configure_logging(level: int = logging.INFO) -> None:
    """Send the records of this process to stderr. Called once in the server and once in the worker."""
    logging.basicConfig(level=level, format=LINE)
