"""Files that are read again when they change, so that tokens, keys and certificates rotate without a restart.

Knows paths, their stamps, and the parser it was given; nothing of what the files say.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from lda_service.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_Value = TypeVar("_Value")

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """A file as it was read."""

    path: Path
    data: bytes


class Reloaded(Generic[_Value]):
    """What a parser makes of some files: of their newest version that it accepts.

    Args:
        parse: takes a `Source` per file; raises `ConfigError`.
        paths: the files.

    Raises:
        ConfigError: the first version cannot be read or parsed.
    """

    def __init__(self, parse: Callable[..., _Value], *paths: Path) -> None:
        self._parse, self._paths = parse, paths
        self._stamps = self._look()
        self._value = self._read()

    def value(self) -> _Value:
        """The value now. A version that cannot be used is reported once, and the former one stays."""
        # Stamps come before contents: a change between the two is seen next time.
        if (stamps := self._look()) != self._stamps:
            self._stamps = stamps
            try:
                self._value = self._read()
            except ConfigError as error:
                log.error("CHANGED FILE REFUSED, THE FORMER VERSION STAYS IN FORCE: %s", error.message)
            else:
                log.info("read again: %s", ", ".join(map(str, self._paths)))
        return self._value

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]

    def _read(self) -> _Value:
        return self._parse(*map(read, self._paths))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file; through links, since mounted secrets are exchanged by moving one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read(path: Path) -> Source:
    """A file as it is now.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Source(path, path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error.strerror or error}; check the path and its file mode."
        ) from error
