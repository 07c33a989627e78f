"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end it is flushed to disk and takes its place."""
    scratch = path.with_name(f".{path.name}.partial")
    yield scratch
    flush(scratch)
    scratch.replace(path)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole file, or leave the one that was there."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
