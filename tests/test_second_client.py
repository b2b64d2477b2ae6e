"""docs/protocol.md suffices: a client that was written from it, and shares no code with ours."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import queue
import socket
import ssl
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import msgpack
import psutil
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from transformers import AutoModelForCausalLM

from swarm.identity import SwarmKey
from swarm.local import LocalSwarm
from swarm.models.demo import DEMO_MODEL
from tests.nursery import QuickSwarm

BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
SECRET = SwarmKey.generate().text()
SHA256, PKCS1 = hashes.SHA256(), padding.PKCS1v15()


def pack(value: Any) -> bytes:
    packed: Any = msgpack.packb(value)
    return packed


def purpose_key(purpose: str) -> bytes:
    """Section 4."""
    secret = base64.urlsafe_b64decode(SECRET.removeprefix("swarm-key-1:"))[:32]
    return HKDF(SHA256, 32, None, b"swarm-key-1 " + purpose.encode()).derive(secret)


def base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = BASE58[digit] + text
    return text


class Server:
    """One server: pinned (section 1), asked who it is, and a session on it (section 5)."""

    def __init__(self, address: str, key: rsa.RSAPrivateKey) -> None:
        self.key = key
        self.modulus = key.public_key().public_numbers().n.to_bytes(256, "big")
        pem = fetch_certificate(address)
        certificate = x509.load_pem_x509_certificate(pem)
        self.digest = certificate.fingerprint(SHA256)
        self.peer_id = peer_behind(certificate)
        name = hashlib.sha256(self.peer_id.encode()).hexdigest()[:40] + ".peer.invalid"
        self.channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(pem),
            [("grpc.ssl_target_name_override", name)],
        )
        self.link: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.link.put(pack([os.urandom(16), False]))
        self.messages: Iterator[bytes] = self.channel.stream_stream("/swarm/link")(
            iter(self.link.get, None), timeout=600
        )
        self.stream = self.sent = 0
        self.frames: list[bytes] = []  # that came on this stream
        nonce = os.urandom(16)
        question = {"kind": "info_request", "nonce": nonce, "credentials": self.credentials(nonce)}
        self.dial("info")
        self.send(**question)
        self.record: bytes = self.receive()["record"]
        self.fields = self.check_record()

    def credentials(self, session_id: bytes) -> dict[str, bytes]:
        """Section 4."""
        transcript = b"swarm-opening-1"
        for part in (self.peer_id.encode(), self.digest, session_id, self.modulus):
            transcript += struct.pack(">H", len(part)) + part
        return {
            "public_key": self.modulus,
            "signature": self.key.sign(transcript, PKCS1, SHA256),
            "proof": hmac.digest(purpose_key("access"), transcript, "sha256"),
        }

    def check_record(self) -> list[Any]:
        """Section 3."""
        data = AESGCM(purpose_key("records")).decrypt(self.record[:12], self.record[12:], None)
        modulus, signature, payload = data[:256], data[256:512], data[512:]
        key = rsa.RSAPublicNumbers(65537, int.from_bytes(modulus, "big")).public_key()
        key.verify(signature, b"swarm-server-record-1" + payload, PKCS1, SHA256)
        fields: list[Any] = msgpack.unpackb(payload)
        assert fields[0] == 1
        assert fields[10] == self.digest
        return fields

    @property
    def target(self) -> dict[str, bytes]:
        return {"record": self.record, "session_id": self.session_id, "ticket": self.ticket}

    def open(self, following: Server | None) -> dict[str, Any]:
        self.session_id, self.ticket = os.urandom(16), os.urandom(16)
        self.dial("session")
        name, fingerprint, start, end, dtype = self.fields[1:6]
        self.send(
            kind="open",
            model=name,
            fingerprint=fingerprint.hex(),
            dtype=dtype,
            session_id=self.session_id,
            ticket=self.ticket,
            start=start,
            end=end,
            batch_size=1,
            max_length=64,
            next=following and following.target,
            credentials=self.credentials(self.session_id),
        )
        return self.receive()

    def dial(self, method: str) -> None:
        """Section 1: another stream, which takes the place of the one before."""
        if self.stream:
            self.post(3, b"hung up")
        self.stream, self.sent, self.frames = self.stream + 1, 0, []
        self.post(1, method.encode())

    def post(self, kind: int, payload: bytes) -> None:
        """Section 1: a message of one frame."""
        self.link.put(pack([self.stream, self.sent, kind, payload]))
        self.sent += 1

    def send(self, **message: Any) -> None:
        self.post(0, pack(message))

    def receive(self) -> dict[str, Any]:
        while not self.frames:
            parts = iter(msgpack.unpackb(next(self.messages)))
            for stream, _, kind, payload in zip(parts, parts, parts, parts, strict=True):
                if (stream, kind) == (self.stream, 0):
                    self.frames.append(payload)
        return msgpack.unpackb(self.frames.pop(0))

    def close(self) -> None:
        self.link.put(None)
        self.channel.close()


def fetch_certificate(address: str) -> bytes:
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(socket.create_connection((host, int(port)), 10)) as connection:
        der = connection.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


def peer_behind(certificate: x509.Certificate) -> str:
    """The peer id whose key signed the certificate's."""
    value: Any = certificate.extensions.get_extension_for_oid(EXTENSION).value
    der: bytes = value.value
    # SEQUENCE (82 ll ll) of two OCTET STRINGs (04 82 ll ll)
    size = int.from_bytes(der[6:8], "big")
    public, signature = der[8 : 8 + size], der[8 + size + 4 :]
    key: Any = serialization.load_der_public_key(public[5:])  # 08 00 12 and a two-byte length
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    key.verify(signature, b"libp2p-tls-handshake:" + spki, PKCS1, SHA256)
    return base58(b"\x12\x20" + hashlib.sha256(public).digest())


def tensor(values: torch.Tensor) -> dict[str, Any]:
    values = values.detach().contiguous()
    return {"dtype": "float32", "shape": list(values.shape), "data": values.numpy().tobytes()}


def tokens(frame: dict[str, Any]) -> torch.Tensor:
    """The inverse of `tensor`."""
    return torch.frombuffer(bytearray(frame["data"]), dtype=torch.float32).view(frame["shape"])


IDS = torch.tensor([[5, 17, 300, 42, 9, 101, 77, 8]])


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    """The last of its servers may be killed."""
    with QuickSwarm(spans=["0:9", "9:24", "9:24"], swarm_key=SECRET, dtype="float32") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def servers(swarm: LocalSwarm) -> Iterator[list[Server]]:
    key = rsa.generate_private_key(65537, 2048)
    found = [Server(server.address, key) for server in swarm.servers]
    yield found
    for server in found:
        server.close()


@torch.no_grad()
def test_a_client_written_from_the_document_generates_as_one_machine_does(
    servers: list[Server], model: Any
) -> None:
    first, last, _ = servers
    ids = IDS[:, :6]
    assert last.open(None)["kind"] == "opened"
    opened = first.open(last)
    assert (opened["kind"], opened["protocol"]) == ("opened", 1)

    def through(step: int, start: int, end: int, **more: Any) -> torch.Tensor:
        """A step by way of both servers, the second being pushed to; logits [T, V]."""
        hidden = model.model.embed_tokens(ids[:, start:end])
        first.send(kind="step", step=step, start=start, hidden=tensor(hidden), **more)
        copy, answer = first.receive(), last.receive()
        assert (copy["kind"], copy["step"], copy["pushed"]) == ("output", step, True)
        assert (answer["kind"], answer["step"]) == ("output", step)
        assert not answer.get("pushed")
        assert copy["hidden"]["shape"] == list(hidden.shape)
        assert answer["hidden"]["shape"][1] == min(end - start, more.get("keep", end))
        return model.lm_head(model.model.norm(tokens(answer["hidden"])))[0]

    expected = model(ids).logits[0]
    got = [through(0, 0, 4, epoch=0), through(1, 4, 5, epoch=0)]
    for server in (first, last):
        server.send(kind="sync", epoch=1)
        synced = {"kind": "synced", "epoch": 1, "position": 5, "last_step": 1}
        assert server.receive() == synced
    got.append(through(7, 3, 6, epoch=1, crop_to=3, keep=1))
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-4, rtol=0)

    zeros = tensor(torch.zeros(1, 1, model.config.hidden_size))
    first.send(kind="step", epoch=1, step=8, start=9, hidden=zeros)
    refused = first.receive()
    assert (refused["kind"], refused["code"], refused["position"]) == ("refused", "gap", 6)


@torch.no_grad()
def test_section_9_suffices_to_survive_a_failover(
    swarm: LocalSwarm, servers: list[Server], model: Any
) -> None:
    """The server pushed to dies before it gets step 2; another one is fed from the copies."""
    first, spare, victim = servers
    expected = model(IDS).logits[0]
    assert victim.open(None)["kind"] == "opened"
    assert first.open(victim)["kind"] == "opened"
    border: list[torch.Tensor] = []  # what crossed block 9

    def ask(step: int, start: int, end: int, epoch: int) -> None:
        hidden = tensor(model.model.embed_tokens(IDS[:, start:end]))
        first.send(kind="step", epoch=epoch, step=step, start=start, hidden=hidden)

    def check(answer: dict[str, Any], start: int) -> None:
        logits = model.lm_head(model.model.norm(tokens(answer["hidden"])))[0]
        torch.testing.assert_close(logits, expected[start:][: len(logits)], atol=1e-4, rtol=0)

    def synced(server: Server) -> dict[str, Any]:
        server.send(kind="sync", epoch=1)
        while (answer := server.receive())["kind"] != "synced":
            if answer["kind"] == "output":
                border.append(tokens(answer["hidden"]))
        return answer

    for step, start, end in ((0, 0, 4), (1, 4, 5)):
        ask(step, start, end, epoch=0)
        border.append(tokens(first.receive()["hidden"]))
        check(victim.receive(), start)
    swarm.kill(2)
    ask(2, 5, 6, epoch=0)
    with pytest.raises(grpc.RpcError):
        victim.receive()
    while len(border) < 3:  # it says `push_failed`, too
        answer = first.receive()
        if answer["kind"] == "output":
            border.append(tokens(answer["hidden"]))
    stands = {"kind": "synced", "epoch": 1, "position": 6, "last_step": 2}
    assert synced(first) == stands
    assert spare.open(None)["kind"] == "opened"
    first.send(kind="redirect", next=spare.target)
    assert synced(first) == stands
    again: dict[str, Any] = {"kind": "step", "epoch": 1, "push": False}
    known, new = torch.cat(border[:2], dim=1), border[2]
    spare.send(**again, step=3, start=0, hidden=tensor(known), quiet=True)
    spare.send(**again, step=4, start=5, hidden=tensor(new))
    assert spare.receive()["hidden"]["shape"] == [1, 0, model.config.hidden_size]
    check(spare.receive(), 5)
    for step, start in ((5, 6), (6, 7)):
        ask(step, start, start + 1, epoch=1)
        assert first.receive()["pushed"]
        check(spare.receive(), start)


def test_bad_frames_get_a_code_and_cost_a_real_server_nothing(
    swarm: LocalSwarm, servers: list[Server], model: Any
) -> None:
    """Somebody else's session goes on, and the process does not grow."""
    first, honest, _ = servers
    process = psutil.Process(swarm.servers[1].pid)
    stranger = Server(swarm.servers[1].address, first.key)
    assert honest.open(None)["kind"] == "opened"
    hidden = tensor(torch.zeros(1, 1, model.config.hidden_size))
    ticket = {"session_id": honest.session_id, "ticket": bytes(16)}
    bad = {
        "bad_frame": [b"", b"noise", b"\xc1" * (1 << 24), pack({"kind": "step"})],
        "out_of_order": [pack({"kind": "sync", "epoch": 1})],
    }

    def once(step: int) -> None:
        for method in ("session", "push"):
            for code, frames in bad.items():
                for frame in frames:
                    stranger.dial(method)
                    stranger.post(0, frame)
                    refused = stranger.receive()
                    assert (refused["kind"], refused["code"]) == ("refused", code)
        stranger.dial("push")
        stranger.send(kind="attach", **ticket)
        assert stranger.receive()["code"] == "unknown_session"
        honest.send(kind="step", epoch=0, step=step, start=step, hidden=hidden)
        assert honest.receive()["kind"] == "output"

    for step in range(3):
        once(step)
    before = process.memory_info().rss
    for step in range(3, 11):  # at least a quarter of a gigabyte
        once(step)
    assert process.memory_info().rss - before < 100 << 20
    stranger.post(0, bytes((1 << 24) + 1))  # larger than any frame may be
    with pytest.raises(grpc.RpcError):
        stranger.receive()
    stranger.close()
    honest.send(kind="step", epoch=0, step=11, start=11, hidden=hidden)
    assert honest.receive()["kind"] == "output"
