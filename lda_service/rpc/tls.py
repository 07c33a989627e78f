"""Certificates: credentials of the server, read again at the next handshake after a change, and of a channel to it.

Knows files and what must fit together in them. Does not know who may call.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

from lda_service.errors import ConfigError
from lda_service.rpc.reload import Reloaded, read

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.x509 import Certificate

    from lda_service.config import AccessConfig
    from lda_service.rpc.reload import Source

log = logging.getLogger(__name__)


def server_credentials(access: AccessConfig) -> grpc.ServerCredentials | None:
    """Credentials that follow their files; None without a certificate. With a client CA, callers must show one too.

    Raises:
        ConfigError: a file cannot be read, or the key is not the certificate's.
    """
    if access.tls_cert is None or access.tls_key is None:
        return None
    authorities = (access.tls_client_ca,) if access.tls_client_ca else ()
    files = Reloaded(_configuration, access.tls_cert, access.tls_key, *authorities)
    given = files.value()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each handshake, in its own thread: the new configuration, or None for the one it has."""
        nonlocal given
        former, given = given, files.value()
        return given if given is not former else None

    # The type stubs do not know that None is an answer.
    return grpc.dynamic_ssl_server_credentials(given, fetch, bool(authorities))  # type: ignore[arg-type]


def channel_credentials(ca: Path | None, cert: Path | None, key: Path | None) -> grpc.ChannelCredentials:
    """Credentials of a client: whom it trusts, and who it is.

    Raises:
        ConfigError: a file cannot be read.
    """
    trusted, mine, private = (read(path).data if path else None for path in (ca, cert, key))
    return grpc.ssl_channel_credentials(trusted, private, mine)


def _configuration(cert: Source, key: Source, ca: Source | None = None) -> grpc.ServerCertificateConfiguration:
    leaf, *_ = _certificates(cert)
    try:
        private = load_pem_private_key(key.data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{key.path} holds no private key in PEM that can be read without a password.") from error
    if private.public_key() != leaf.public_key():
        raise ConfigError(
            f"The key in {key.path} is not that of the certificate in {cert.path}; give the two that belong together."
        )
    if ca is not None:
        _certificates(ca)
    _tell_expiry(cert, leaf)
    return grpc.ssl_server_certificate_configuration([(key.data, cert.data)], ca.data if ca else None)


def _certificates(source: Source) -> list[Certificate]:
    try:
        return load_pem_x509_certificates(source.data)
    except ValueError as error:
        raise ConfigError(
            f"{source.path} holds no certificate in PEM; give a file that begins with BEGIN CERTIFICATE."
        ) from error


def _tell_expiry(source: Source, leaf: Certificate) -> None:
    expires = leaf.not_valid_after_utc
    level = logging.INFO if expires > datetime.now(UTC) else logging.ERROR
    log.log(level, "the certificate in %s is valid until %s", source.path, expires.isoformat())
