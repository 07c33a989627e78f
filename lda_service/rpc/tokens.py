"""The file of tokens: who may do what, by the SHA-256 of a token. The tokens themselves are stored nowhere.

A line is: name, hash, scopes with commas between, and optionally when the token expires. Tokens are random and long, so
a plain hash is enough: there is nothing to guess that a slow one would protect. Knows nothing of gRPC.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING

from lda_service.config import SCOPES
from lda_service.errors import ConfigError, Unauthenticated
from lda_service.rpc.reload import Reloaded

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lda_service.rpc.reload import Source

NAME = re.compile(r"[\w.:@/+-]{1,128}", re.ASCII)
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
TOKEN_PREFIX = "lda_"  # so that scanners for leaked secrets can find them
TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows, and whom."""

    name: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the file."""

    digest: bytes
    grant: Grant
    expires: datetime | None = None


class TokenFile:
    """The tokens of a file, read again when it changes.

    Raises:
        ConfigError: the file cannot be read, or a line of it.
    """

    def __init__(self, path: Path) -> None:
        self._entries = Reloaded(parse, path)

    def find(self, token: str) -> Grant | None:
        """What a token allows; None if it is not in the file.

        Raises:
            Unauthenticated: it has expired.
        """
        digest, found = sha256(token.encode()).digest(), None
        for entry in self._entries.value():
            if hmac.compare_digest(entry.digest, digest):
                found = entry  # and on to the end, so that the time tells nothing
        if found is None:
            return None
        if found.expires is not None and found.expires <= datetime.now(UTC):
            raise expired()
        return found.grant


def expired() -> Unauthenticated:
    """The error for a token that was good once."""
    return Unauthenticated("The token has expired; send a new one.")


def parse(source: Source) -> tuple[Entry, ...]:
    """The lines of a file of tokens.

    Raises:
        ConfigError: a line cannot be read, or there is none.
    """
    entries: dict[bytes, Entry] = {}
    for number, line in enumerate(source.data.decode(errors="replace").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entry = _entry(line.split())
            if entry.digest in entries:
                raise ValueError("this token is in the file already")
        except ValueError as error:
            raise ConfigError(
                f"{source.path}, line {number}: {error}. A line is: NAME SHA256 SCOPE,SCOPE [EXPIRES]; "
                "`lda-service token NAME --scope SCOPE` makes one."
            ) from error
        entries[entry.digest] = entry
    if not entries:
        raise ConfigError(f"{source.path} holds no token; make one with `lda-service token NAME --scope SCOPE`.")
    return tuple(entries.values())


def create(name: str, scopes: Iterable[str], expires: str | None = None) -> tuple[str, str]:
    """A fresh token, and the line for the file.

    Raises:
        ValueError: the name or the time cannot stand in a line.
    """
    token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    words = [name, sha256(token.encode()).hexdigest(), ",".join(dict.fromkeys(scopes)), *([expires] if expires else [])]
    _entry(words)
    return token, " ".join(words)


def _entry(words: list[str]) -> Entry:
    if not 3 <= len(words) <= 4:
        raise ValueError(f"{len(words)} words instead of three or four")
    name, digest, scopes = words[:3]
    if not NAME.fullmatch(name):
        raise ValueError("the name may hold letters, digits and . : @ / + - _ only")
    if not DIGEST.fullmatch(digest):
        raise ValueError("the second word must be the SHA-256 of the token, 64 hexadecimal digits")
    granted = frozenset(scopes.split(","))
    if not granted <= set(SCOPES):
        raise ValueError(f"scopes are {', '.join(SCOPES)}, with commas between and no spaces")
    return Entry(bytes.fromhex(digest), Grant(name, granted), _time(words[3]) if len(words) == 4 else None)


def _time(text: str) -> datetime:
    """A date, which means its first moment in UTC, or a time with its offset."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is not None and re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        return time.replace(tzinfo=UTC)
    if time is None or time.tzinfo is None:
        raise ValueError("the expiry must be a date, or a time with its offset, as 2027-01-31T12:00:00Z")
    return time
