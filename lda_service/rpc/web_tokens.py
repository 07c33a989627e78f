"""JSON web tokens: signatures, audience, issuer and expiry are checked by PyJWT against the keys of a file.

Only signatures that need a private key to make count: a public key, which everybody may know, is never taken for a
shared secret. Knows nothing of gRPC.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from lda_service.config import SCOPES
from lda_service.errors import ConfigError
from lda_service.rpc.reload import Reloaded
from lda_service.rpc.tokens import Grant, expired

if TYPE_CHECKING:
    from pathlib import Path

    from lda_service.rpc.reload import Source

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
CLOCK_SKEW_S = 30.0
RSA_BITS_MIN = 2048
NAME_CHARS_MAX = 128

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, what its file calls it, and the algorithms it may be used with."""

    public: PublicKey
    key_id: str | None = None
    algorithms: tuple[str, ...] = ALGORITHMS


class WebTokens:
    """The tokens that an issuer signs.

    Args:
        keys: a public key in PEM, or a JSON web key set; read again when it changes.
        audience: who the tokens are for: this service.
        issuer: who issues them; None does not look.

    Raises:
        ConfigError: the keys cannot be read.
    """

    def __init__(self, keys: Path, audience: str, issuer: str | None = None) -> None:
        self._keys = Reloaded(parse, keys)
        self._audience, self._issuer = audience, issuer

    def find(self, token: str) -> Grant | None:
        """What a token allows; None if it is not one of ours.

        Raises:
            Unauthenticated: it has expired.
        """
        try:
            claims = self._claims(token)
        except jwt.ExpiredSignatureError as error:
            raise expired() from error
        except jwt.PyJWTError:
            return None
        name, scope = claims["sub"], claims.get("scope")
        scopes = frozenset(scope.split() if isinstance(scope, str) else ()) & set(SCOPES)
        return Grant(printable(name), scopes) if name else None

    def _claims(self, token: str) -> dict[str, Any]:
        key = self._key(jwt.get_unverified_header(token).get("kid"))
        return jwt.decode(
            token,
            key.public,
            algorithms=key.algorithms,
            audience=self._audience,
            issuer=self._issuer,
            leeway=CLOCK_SKEW_S,
            options={"require": ["exp", "sub", "aud"]},
        )

    def _key(self, key_id: str | None) -> Key:
        keys = self._keys.value()
        if len(keys) == 1 and (key_id is None or keys[0].key_id is None):
            return keys[0]
        for key in keys:
            if key_id is not None and key.key_id == key_id:
                return key
        raise jwt.InvalidTokenError("no key of this id")


def printable(name: str) -> str:
    """A name from outside, fit for a line of the log."""
    return "".join(each if each.isprintable() else "?" for each in name[:NAME_CHARS_MAX])


def parse(source: Source) -> tuple[Key, ...]:
    """The public keys of a file.

    Raises:
        ConfigError: there is none that can be used.
    """
    try:
        is_set = source.data.lstrip().startswith(b"{")
        keys = _of_set(json.loads(source.data)) if is_set else (Key(_checked(load_pem_public_key(source.data))),)
    except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{source.path} holds no public key that can be used ({error}); give a public key in PEM "
            "(`openssl pkey -in PRIVATE -pubout`) or a JSON web key set: RSA, EC or Ed25519."
        ) from error
    return keys


def _of_set(document: dict[str, Any]) -> tuple[Key, ...]:
    """The signing keys of a set; what is for encryption, or of a kind that we do not use, is passed over."""
    keys = []
    for data in document.get("keys", ()):
        if data.get("kty") == "oct" or data.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK(data)
        except jwt.PyJWTError:
            continue
        algorithms = (data["alg"],) if "alg" in data else ALGORITHMS
        if key.algorithm_name in ALGORITHMS:
            keys.append(Key(_checked(key.key), key.key_id, algorithms))
    if not keys:
        raise ValueError("the set has no asymmetric signing key")
    return tuple(keys)


def _checked(key: object) -> PublicKey:
    if not isinstance(key, PublicKey):
        raise ValueError(f"{type(key).__name__} is not a public key for signatures")
    if isinstance(key, RSAPublicKey) and key.key_size < RSA_BITS_MIN:
        raise ValueError(f"an RSA key of {key.key_size} bits is too short, {RSA_BITS_MIN} are needed")
    return key
