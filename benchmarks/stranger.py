"""Strangers who do what they must not: each must be answered, or let go, within seconds."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from typing import Any

import torch

from swarm.client.hop import Terms, endpoint_of
from swarm.dht.records import SignedRecord
from swarm.errors import SwarmError
from swarm.identity import Access, Identity, opening_transcript
from swarm.messages import Attach, Open, Step
from swarm.rpc import RpcTransport
from swarm.tensors import to_frame
from swarm.transport import Stream
from swarm.wire import encode

PATIENCE = 20.0  # seconds
KINDS = (
    "noise",
    "noise on a push stream",
    "a push to nobody's session",
    "a forged opening",
    "an opening for more than there is",
    "an opening, then noise",
    "an opening, then nothing",
    "a flood of steps, nothing read",
    "a step, then gone",
)
_LEAVES = {"an opening, then nothing", "a flood of steps, nothing read", "a step, then gone"}
_identity = Identity.ephemeral()


async def visit(kind: str, server: SignedRecord, terms: Terms) -> bool:
    """Over a connection of its own. Whether the server answered, where it owes an answer."""
    transport = RpcTransport()
    try:
        async with asyncio.timeout(PATIENCE):
            return await _visit(kind, server, terms, transport)
    except TimeoutError:
        return False
    except SwarmError:  # it died, or closed the stream: an answer, too
        return True
    finally:
        await transport.close()


async def _visit(kind: str, server: SignedRecord, terms: Terms, transport: RpcTransport) -> bool:
    pushes = "push" in kind
    method = "push" if pushes else "session"
    stream = await transport.open_stream(endpoint_of(server.record), method, PATIENCE)
    try:
        await _misbehave(kind, server, terms, stream)
        if kind in _LEAVES:
            return True
        while await stream.receive() is not None:
            pass
        return True
    finally:
        stream.cancel()


async def _misbehave(kind: str, server: SignedRecord, terms: Terms, stream: Stream) -> None:
    if kind.startswith("noise"):
        await stream.send(secrets.token_bytes(2000))
        return
    if kind.startswith("a push"):
        nobody = Attach(session_id=secrets.token_bytes(16), ticket=secrets.token_bytes(16))
        await stream.send(encode(nobody))
        return
    changes: dict[str, Any] = {}
    if "forged" in kind:
        changes["session_id"] = secrets.token_bytes(16)
    if "more than" in kind:
        changes |= {"batch_size": 1024, "max_length": 1 << 20}
    await stream.send(encode(_opening(server, terms).model_copy(update=changes)))
    if "then noise" in kind:
        await stream.send(secrets.token_bytes(2000))
    if kind in _LEAVES:
        await stream.receive()
        hidden = torch.zeros(1, 1 if "gone" in kind else 256, terms.hidden_size)
        steps = {"an opening, then nothing": 0, "a step, then gone": 1}.get(kind, 60)
        with suppress(TimeoutError):  # a flood is not taken in for ever
            async with asyncio.timeout(2.0):
                for number in range(steps):
                    start = number * hidden.shape[1]
                    step = Step(epoch=0, step=number, start=start, hidden=to_frame(hidden))
                    await stream.send(encode(step))
        await asyncio.sleep(0.5)


def _opening(server: SignedRecord, terms: Terms) -> Open:
    record, session_id = server.record, secrets.token_bytes(16)
    access = Access(_identity)
    transcript = opening_transcript(
        record.peer_id, record.certificate_digest, session_id, _identity.public_key
    )
    return Open(
        model=terms.model.name,
        fingerprint=terms.model.fingerprint,
        dtype=terms.numerics.dtype,
        quantization=terms.numerics.quantization,
        session_id=session_id,
        ticket=secrets.token_bytes(16),
        start=record.blocks.start,
        end=record.blocks.end,
        batch_size=1,
        max_length=2048,
        credentials=access.sign_opening(transcript),
    )
