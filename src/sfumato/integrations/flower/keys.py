"""Keys for a federation: an authority of its own with a certificate for the server, and a key pair for every node."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sfumato import _validate


@dataclass(frozen=True)
class Certificates:
    """Files in PEM: ``authority`` goes to every node, ``certificate`` and ``key`` stay with the SuperLink."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class NodeKey:
    """Files in OpenSSH's format: ``public`` is registered with the SuperLink, ``private`` stays with the node."""

    private: Path
    public: Path


def certificates(folder: str | Path, hosts: Sequence[str], *, days: int = 365) -> Certificates:
    """A new authority and a certificate that it signed for ``hosts`` (names or addresses), valid for ``days``.

    Nothing else is ever signed: the authority's own key is not kept. ECDSA over P-384 with SHA-384. Private files are
    readable by their owner only. Raises ``FileExistsError`` rather than replace a file.
    """
    _validate.count("days", days)
    begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)
    ends = begins + datetime.timedelta(days=days)
    root, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sfumato federation")])
    identity = x509.SubjectKeyIdentifier.from_public_key(root.public_key())

    def named(subject: x509.Name, public: ec.EllipticCurvePublicKey, authority: bool) -> x509.CertificateBuilder:
        usage = x509.KeyUsage(
            digital_signature=not authority,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=authority,
            crl_sign=authority,
            encipher_only=False,
            decipher_only=False,
        )
        return (
            x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), begins, ends)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity), critical=False)
        )

    authority = named(issuer, root.public_key(), True).sign(root, hashes.SHA384())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    certificate = (
        named(subject, key.public_key(), False)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(root, hashes.SHA384())
    )
    place = _folder(folder)
    files = Certificates(place / "authority.pem", place / "server.pem", place / "server.key")
    _write(files.authority, authority.public_bytes(Encoding.PEM), 0o644)
    _write(files.certificate, certificate.public_bytes(Encoding.PEM), 0o644)
    _write(files.key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    return files


def node_key(folder: str | Path, name: str) -> NodeKey:
    """A new P-384 key pair in ``folder/name`` and ``folder/name.pub``, by which a node proves who it is.

    The private file is readable by its owner only. Raises ``FileExistsError`` rather than replace a file.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    place = _folder(folder)
    files = NodeKey(place / name, place / f"{name}.pub")
    _write(files.private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600)
    _write(files.public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), 0o644)
    return files


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _folder(folder: str | Path) -> Path:
    place = Path(folder).absolute()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def _write(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
