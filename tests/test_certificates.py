"""A certificate is believed only when its peer announced it and signed it."""

import asyncio
import hashlib
import socket
import ssl
import time
from pathlib import Path

import pytest

from swarm.certificates import (
    Certificate,
    check_certificate,
    fetch_certificate,
    issue_certificate,
    needs_rotation,
    target_name,
)
from swarm.errors import AuthenticationError, PeerUnavailable
from swarm.identity import Identity

ALICE, BOB = Identity.ephemeral(), Identity.ephemeral()
NOW = 1_800_000_000.0
DAY = 86_400.0


def test_an_announced_certificate_is_accepted() -> None:
    certificate = issue_certificate(ALICE, NOW)
    check_certificate(certificate.pem, peer_id=ALICE.peer_id, digest=certificate.digest)
    der = ssl.PEM_cert_to_DER_cert(certificate.pem.decode())
    assert certificate.digest == hashlib.sha256(der).digest()
    assert certificate.target_name == target_name(ALICE.peer_id)
    assert certificate.key_pem.decode() not in repr(certificate)


def _flip_last_signature_byte(certificate: Certificate) -> bytes:
    der = bytearray(ssl.PEM_cert_to_DER_cert(certificate.pem.decode()))
    place = der.rindex(ALICE.public_key) + 300  # inside the identity's signature
    der[place] ^= 1
    return bytes(der)


def test_other_certificates_are_refused() -> None:
    mine, theirs = issue_certificate(ALICE, NOW), issue_certificate(BOB, NOW)
    with pytest.raises(AuthenticationError, match="another certificate"):
        check_certificate(
            issue_certificate(ALICE, NOW).pem, peer_id=ALICE.peer_id, digest=mine.digest
        )
    with pytest.raises(AuthenticationError, match="somebody else's"):
        check_certificate(theirs.pem, peer_id=ALICE.peer_id, digest=theirs.digest)
    forged = _flip_last_signature_byte(mine)
    with pytest.raises(AuthenticationError, match="signature"):
        check_certificate(
            ssl.DER_cert_to_PEM_cert(forged).encode(),
            peer_id=ALICE.peer_id,
            digest=hashlib.sha256(forged).digest(),
        )
    for garbage in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        with pytest.raises(AuthenticationError, match="cannot be read"):
            check_certificate(garbage, peer_id=ALICE.peer_id, digest=mine.digest)


def test_certificates_are_replaced_at_half_life() -> None:
    certificate = issue_certificate(ALICE, NOW)
    assert not needs_rotation(certificate, NOW + 3 * DAY)
    assert needs_rotation(certificate, NOW + 4 * DAY)


def test_a_pinned_certificate_is_all_a_client_needs(tmp_path: Path) -> None:
    asyncio.run(_pin_and_connect(tmp_path))


async def _pin_and_connect(tmp_path: Path) -> None:
    certificate = issue_certificate(ALICE, time.time())
    (tmp_path / "chain.pem").write_bytes(certificate.key_pem + certificate.pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "chain.pem")
    server = await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        pem = await fetch_certificate("127.0.0.1", port, 5)
        assert pem.split() == certificate.pem.split()
        check_certificate(pem, peer_id=ALICE.peer_id, digest=certificate.digest)
        pinned = ssl.create_default_context(cadata=pem.decode())
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=pinned, server_hostname=target_name(ALICE.peer_id)
        )
        writer.transport.abort()
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(
                "127.0.0.1", port, ssl=pinned, server_hostname=target_name(BOB.peer_id)
            )


def test_servers_that_do_not_answer_are_unavailable() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        port = mute.getsockname()[1]
        with pytest.raises(PeerUnavailable, match="does not answer"):
            asyncio.run(fetch_certificate("127.0.0.1", port, 5))  # refuses
        mute.listen()
        with pytest.raises(PeerUnavailable, match="does not answer"):
            asyncio.run(fetch_certificate("127.0.0.1", port, 0.05))  # accepts and says nothing
