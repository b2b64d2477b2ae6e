"""Who somebody is: the RSA key a peer id is made of, and the shared secret of a private swarm.

Keys and peer ids are libp2p's, so that the DHT's daemon and we mean the same peer
(https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from swarm.errors import AuthenticationError, UsageError
from swarm.messages import Credentials

PUBLIC_KEY_BYTES = SIGNATURE_BYTES = 256  # RSA-2048; the exponent is always 65537
_EXPONENT = 65537
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_KEY_PREFIX = "swarm-key-1:"
_NONCE_BYTES = 12


class Identity:
    """One peer's key pair. `public_key` is the RSA modulus, 256 bytes big-endian."""

    def __init__(self, private_key: rsa.RSAPrivateKey) -> None:
        numbers = private_key.public_key().public_numbers()
        if private_key.key_size != 8 * PUBLIC_KEY_BYTES or numbers.e != _EXPONENT:
            raise UsageError("an identity must be an RSA-2048 key with exponent 65537")
        self._private_key = private_key
        self.public_key = numbers.n.to_bytes(PUBLIC_KEY_BYTES, "big")
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def ephemeral(cls) -> Identity:
        """A new identity that is never written down by us."""
        return cls(rsa.generate_private_key(_EXPONENT, 8 * PUBLIC_KEY_BYTES))

    @classmethod
    def load_or_create(cls, path: str | Path) -> Identity:
        """The identity in `path`, which is made (mode 0400) if missing. Raises UsageError."""
        path = Path(path).expanduser()
        try:
            if path.exists():
                return cls._parse(path.read_bytes())
            identity = cls.ephemeral()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_secret(path, identity.private_bytes())
        except OSError as error:
            raise UsageError(f"identity file {path}: {error.strerror}; choose another") from error
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{path} is not an identity file; choose another, or one that does not exist yet"
            ) from error
        return identity

    @classmethod
    def _parse(cls, data: bytes) -> Identity:
        # libp2p's PrivateKey protobuf: 08 00 (type RSA), 12 and a two-byte length, PKCS#1 DER
        if len(data) < 5 or data[:3] != b"\x08\x00\x12" or _length(data[3:5]) != len(data) - 5:
            raise ValueError("not a libp2p RSA key")
        key = serialization.load_der_private_key(data[5:], password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise TypeError("not an RSA key")
        return cls(key)

    def private_bytes(self) -> bytes:
        """What identity files hold: the key as libp2p's PrivateKey protobuf."""
        der = self._private_key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        return b"\x08\x00\x12" + _varint(len(der)) + der

    def sign(self, data: bytes) -> bytes:
        """PKCS#1 v1.5 with SHA-256, 256 bytes: what libp2p uses for RSA."""
        return self._private_key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def write_secret(path: Path, content: bytes) -> None:
    """Where no file is yet, readable by the owner alone. Raises OSError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
        file.write(content)


def verify(public_key: bytes, data: bytes, signature: bytes) -> None:
    """Raises AuthenticationError unless `signature` is the key owner's over `data`."""
    try:
        _rsa_key(public_key).verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, ValueError) as error:
        raise AuthenticationError("a signature does not fit its key") from error


def peer_id_of(public_key: bytes) -> str:
    """base58(multihash(sha256(libp2p public key)), `Qm...`. Raises AuthenticationError."""
    return _base58(b"\x12\x20" + hashlib.sha256(to_libp2p(public_key)).digest())


def to_libp2p(public_key: bytes) -> bytes:
    """The key as libp2p's PublicKey protobuf. Raises AuthenticationError if it is no key."""
    try:
        key = _rsa_key(public_key)
    except ValueError as error:
        raise AuthenticationError("not an RSA-2048 public key") from error
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return b"\x08\x00\x12" + _varint(len(der)) + der


def from_libp2p(encoded: bytes) -> bytes:
    """The inverse of `to_libp2p`. Raises AuthenticationError."""
    public_key = encoded[-PUBLIC_KEY_BYTES - 5 : -5]  # modulus, then the exponent 02 03 01 00 01
    if to_libp2p(public_key) != encoded:
        raise AuthenticationError("not an RSA-2048 public key of libp2p")
    return public_key


def _rsa_key(public_key: bytes) -> rsa.RSAPublicKey:
    if len(public_key) != PUBLIC_KEY_BYTES or public_key[0] < 0x80:
        raise ValueError("not 2048 bits")
    return rsa.RSAPublicNumbers(_EXPONENT, int.from_bytes(public_key, "big")).public_key()


def _varint(number: int) -> bytes:
    """Two bytes: enough for the lengths of RSA-2048 keys (294 and about 1190)."""
    assert 128 <= number < 1 << 14
    return bytes([number & 0x7F | 0x80, number >> 7])


def _length(varint: bytes) -> int:
    return varint[0] & 0x7F | varint[1] << 7


def _base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return text


class SwarmKey:
    """The shared secret of a private swarm; from it comes one key for each purpose."""

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == 32
        self._secret = secret
        self._records = AESGCM(self._derive("records"))
        self._names = self._derive("names")
        self._access = self._derive("access")
        self._rpcs = self._derive("dht rpc")

    @classmethod
    def generate(cls) -> SwarmKey:
        return cls(secrets.token_bytes(32))

    @classmethod
    def parse(cls, text: str) -> SwarmKey:
        """The inverse of `text()`. Raises UsageError."""
        encoded = text.strip().removeprefix(_KEY_PREFIX)
        try:
            raw = base64.b64decode(encoded.encode(), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raw = b""
        if len(raw) != 36 or cls._checksum(raw[:32]) != raw[32:]:
            raise UsageError(
                "this is not a swarm key (swarm-key-1:...), or a typing error is in it; "
                "copy it again, or make one with `swarm key new`"
            )
        return cls(raw[:32])

    @classmethod
    def load(cls, path: str | Path) -> SwarmKey:
        """The key in a text file. Raises UsageError."""
        try:
            return cls.parse(Path(path).expanduser().read_text())
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} holds no swarm key; write one with `swarm key new`"
            ) from error
        except OSError as error:
            raise UsageError(
                f"swarm key file {path}: {error.strerror}; make one with `swarm key new`"
            ) from error

    def text(self) -> str:
        """One line that people pass on in secret; its checksum catches typing errors."""
        raw = self._secret + self._checksum(self._secret)
        return _KEY_PREFIX + base64.urlsafe_b64encode(raw).decode()

    @staticmethod
    def _checksum(secret: bytes) -> bytes:
        return hashlib.sha256(b"swarm-key-1 checksum" + secret).digest()[:4]

    def _derive(self, purpose: str) -> bytes:
        info = f"swarm-key-1 {purpose}".encode()
        return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(self._secret)

    def seal(self, data: bytes) -> bytes:
        """AES-256-GCM with a random nonce in front: 28 bytes longer than `data`."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._records.encrypt(nonce, data, None)

    def unseal(self, sealed: bytes) -> bytes:
        """Raises AuthenticationError for what was not sealed with this key."""
        try:
            return self._records.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
        except (InvalidTag, ValueError) as error:
            raise AuthenticationError("not sealed with this swarm's key") from error

    def hide(self, name: str) -> str:
        """A DHT key that nobody outside can find or guess."""
        return hmac.digest(self._names, name.encode(), "sha256").hex()

    def prove(self, transcript: bytes) -> bytes:
        """Proof, good for this transcript alone, of holding the key."""
        return hmac.digest(self._access, transcript, "sha256")

    def check(self, transcript: bytes, proof: bytes) -> None:
        """Raises AuthenticationError unless `proof` was made for `transcript` with this key."""
        if not hmac.compare_digest(self.prove(transcript), proof):
            raise AuthenticationError("no proof of the swarm key")

    def stamp(self, message: bytes) -> bytes:
        """Authenticates one DHT message."""
        return hmac.digest(self._rpcs, message, "sha256")


def opening_transcript(
    server_peer_id: str, certificate_digest: bytes, session_id: bytes, client_public_key: bytes
) -> bytes:
    """What an opening signs: good for one server, one certificate, one session, one client."""
    parts = (server_peer_id.encode(), certificate_digest, session_id, client_public_key)
    return b"swarm-opening-1" + b"".join(len(part).to_bytes(2, "big") + part for part in parts)


@dataclass(frozen=True, slots=True)
class Access:
    """What a peer opens sessions with, and what a server judges openings by."""

    identity: Identity
    swarm_key: SwarmKey | None = None

    def sign_opening(self, transcript: bytes) -> Credentials:
        return Credentials(
            public_key=self.identity.public_key,
            signature=self.identity.sign(transcript),
            proof=self.swarm_key.prove(transcript) if self.swarm_key else b"",
        )

    def sign_for(self, peer_id: str, certificate_digest: bytes, session_id: bytes) -> Credentials:
        """For this server, this certificate and this session (or question) only."""
        key = self.identity.public_key
        return self.sign_opening(opening_transcript(peer_id, certificate_digest, session_id, key))

    def check_opening(self, transcript: bytes, credentials: Credentials) -> str:
        """The opener's peer id. Raises AuthenticationError with a sentence for the log.

        The caller builds `transcript` itself, from `credentials.public_key` and its own values.
        """
        peer_id = peer_id_of(credentials.public_key)
        if self.swarm_key is not None:  # first, because it costs strangers' attempts least of us
            try:
                self.swarm_key.check(transcript, credentials.proof)
            except AuthenticationError as error:
                raise AuthenticationError(f"{peer_id} does not hold the swarm key") from error
        try:
            verify(credentials.public_key, transcript, credentials.signature)
        except AuthenticationError as error:
            raise AuthenticationError(f"{peer_id} did not sign this opening") from error
        return peer_id
