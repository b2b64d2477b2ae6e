"""TLS certificates bound to a peer's identity, and how a client gets the one it pins.

Each is a self-signed ECDSA P-256 leaf with libp2p's extension, in which the identity signs the
leaf's key (https://github.com/libp2p/specs/blob/master/tls/tls.md).
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ssl
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from swarm.errors import AuthenticationError, PeerUnavailable
from swarm.identity import Identity, from_libp2p, peer_id_of, to_libp2p, verify

VALIDITY = 7 * 86_400.0  # seconds
_BACKDATED = 86_400.0  # seconds: clocks may be an hour wrong
_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
_SIGNED_PREFIX = b"libp2p-tls-handshake:"
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A server's certificate: PEM bytes, SHA-256 of its DER, the name clients must ask for."""

    pem: bytes
    key_pem: bytes
    digest: bytes
    target_name: str
    issued_at: float  # seconds since 1970

    def __repr__(self) -> str:
        return f"Certificate({self.target_name}, {self.digest.hex()[:8]})"  # never the key


@asn1.sequence
class _SignedKey:
    public_key: bytes
    signature: bytes


def target_name(peer_id: str) -> str:
    """The name in a peer's certificate: hex, as DNS ignores case and base58 does not."""
    return hashlib.sha256(peer_id.encode()).hexdigest()[:40] + ".peer.invalid"


def issue_certificate(identity: Identity, now: float) -> Certificate:
    """A fresh key pair and its certificate, valid for seven days from `now`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = target_name(identity.peer_id)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signed_key = _SignedKey(
        public_key=to_libp2p(identity.public_key),
        signature=identity.sign(_SIGNED_PREFIX + _spki(key.public_key())),
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_utc(now - _BACKDATED))
        .not_valid_after(_utc(now + VALIDITY))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(
            x509.UnrecognizedExtension(_EXTENSION, asn1.encode_der(signed_key)), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return Certificate(
        pem=certificate.public_bytes(serialization.Encoding.PEM),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        digest=certificate.fingerprint(hashes.SHA256()),
        target_name=name,
        issued_at=now,
    )


def needs_rotation(certificate: Certificate, now: float) -> bool:
    """Whether half of its life is over: time to make a new one and announce that."""
    return now >= certificate.issued_at + VALIDITY / 2


def check_certificate(pem: bytes, *, peer_id: str, digest: bytes) -> None:
    """Raises AuthenticationError unless this is the announced certificate, and `peer_id`'s own.

    Validity dates and the private key's possession are for the TLS handshake to check.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        extension = certificate.extensions.get_extension_for_oid(_EXTENSION).value
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        spki = _spki(certificate.public_key())
        if not isinstance(extension, x509.UnrecognizedExtension):
            raise TypeError("a known extension under libp2p's number")
        signed_key = asn1.decode_der(_SignedKey, extension.value)
    except _UNREADABLE as error:
        raise AuthenticationError(f"{peer_id} shows a certificate that cannot be read") from error
    if certificate.fingerprint(hashes.SHA256()) != digest:
        raise AuthenticationError(f"{peer_id} shows another certificate than it announced")
    public_key = from_libp2p(signed_key.public_key)
    verify(public_key, _SIGNED_PREFIX + spki, signed_key.signature)
    if peer_id_of(public_key) != peer_id:
        raise AuthenticationError(f"{peer_id} shows somebody else's certificate")
    if names.get_values_for_type(x509.DNSName) != [target_name(peer_id)]:
        raise AuthenticationError(f"{peer_id} shows a certificate for another name")


async def fetch_certificate(host: str, port: int, timeout: float) -> bytes:
    """The PEM certificate that a server shows, proving nothing yet. Raises PeerUnavailable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # check_certificate judges it
    context.set_alpn_protocols(["h2"])  # gRPC servers hang up on others
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
        raise PeerUnavailable(f"{host}:{port} does not answer ({error or 'timeout'})") from error
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()  # a polite close would wait for the peer's goodbye
    return ssl.DER_cert_to_PEM_cert(der).encode()


def _spki(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError("not an elliptic curve key")
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
