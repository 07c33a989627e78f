"""The application over the fake engine of the tests, for `measure.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lda_ray import Lda
from server_harness import make_server

if TYPE_CHECKING:
    from ray import serve


def app(args: dict[str, str]) -> serve.Application:
    """The application; it takes no arguments."""
    return Lda.bind(make_server)
