"""An append-only file of numbered records that survives `kill -9` and power loss.

A record is a header (magic, number, length, CRC-32 of the payload) and its payload. What was cut off in the middle, and
what follows it, is dropped when the file is opened again. Knows bytes and numbers only.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_HEADER = struct.Struct("<4sIII")
_MAGIC = b"LDAj"


class Journal:
    """A journal opened for appending, and for reading what is in it. A context manager.

    Attributes:
        path: its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._places: dict[int, tuple[int, int]] = {}
        self._end = self._recover()

    def _recover(self) -> int:
        """Find the whole records, cut off the rest; the length that remains."""
        end = 0
        while (record := self._record_at(end)) is not None:
            number, length = record
            self._places.setdefault(number, (end + _HEADER.size, length))
            end += _HEADER.size + length
        os.ftruncate(self._file, end)
        return end

    def _record_at(self, place: int) -> tuple[int, int] | None:
        """Number and length of the record that begins here; None if there is no whole one."""
        header = os.pread(self._file, _HEADER.size, place)
        if len(header) < _HEADER.size:
            return None
        magic, number, length, checksum = _HEADER.unpack(header)
        if magic != _MAGIC:
            return None
        payload = os.pread(self._file, length, place + _HEADER.size)
        return (number, length) if len(payload) == length and zlib.crc32(payload) == checksum else None

    def append(self, number: int, payload: bytes) -> None:
        """Add a record. It survives the end of this process at once, and power loss after `flush`."""
        record = _HEADER.pack(_MAGIC, number, len(payload), zlib.crc32(payload)) + payload
        written = 0
        while written < len(record):
            written += os.pwrite(self._file, record[written:], self._end + written)
        self._places.setdefault(number, (self._end + _HEADER.size, len(payload)))
        self._end += len(record)

    def read(self, number: int) -> bytes:
        """The payload of a record. Raises KeyError if there is none of this number."""
        place, length = self._places[number]
        return os.pread(self._file, length, place)

    def numbers(self) -> set[int]:
        """The numbers of all records."""
        return set(self._places)

    def flush(self) -> None:
        """Wait until every record is on disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
