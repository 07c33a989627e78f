"""A certificate authority for tests, and certificates of it, as files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = timedelta(days=1)


@dataclass
class Identity:
    """A certificate and its key."""

    cert: Path
    key: Path

    def replace(self, other):
        """Put another identity's files in the place of these, each at once."""
        for mine, theirs in ((self.cert, other.cert), (self.key, other.key)):
            put(mine, theirs.read_bytes())


class Authority:
    """Issues certificates into a folder."""

    def __init__(self, folder, name="test-ca"):
        self.folder, self.subject, self._key = folder, _name(name), ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        self._certificate = self._sign(self.subject, self._key.public_key(), [(constraints, True)])
        self.cert = folder / f"{name}.pem"
        self.cert.write_bytes(self._certificate.public_bytes(Encoding.PEM))

    def issue(self, name, dns=(), uris=(), ips=()):
        """A certificate with these names, good for servers and for clients."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [*map(x509.DNSName, dns), *map(x509.UniformResourceIdentifier, uris)]
        names += [x509.IPAddress(ip_address(each)) for each in ips]
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        extensions = [(usage, False), *([(x509.SubjectAlternativeName(names), False)] if names else [])]
        certificate = self._sign(_name(name), key.public_key(), extensions)
        identity = Identity(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        identity.cert.write_bytes(certificate.public_bytes(Encoding.PEM))
        identity.key.write_bytes(private_pem(key))
        return identity

    def _sign(self, subject, public_key, extensions):
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.subject).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - DAY)
        builder = builder.not_valid_after(now + DAY)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())


def private_pem(key):
    """A private key as it stands in a file."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def put(path, data):
    """Replace a file at once, as operators and kubelets do."""
    fresh = path.with_suffix(".fresh")
    fresh.write_bytes(data if isinstance(data, bytes) else data.encode())
    fresh.replace(path)


def _name(name):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
