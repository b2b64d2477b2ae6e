"""Asks a server about itself and how far it is: for clients, and for servers about next hops."""

from __future__ import annotations

import secrets
import time

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.identity import Access, opening_transcript
from swarm.messages import Info, InfoRequest, Refused
from swarm.transport import Endpoint, Transport
from swarm.wire import decode, encode

_TRIES = 2  # others may connect at the same moment


async def ask(transport: Transport, access: Access, endpoint: Endpoint, timeout: float) -> Info:
    """What a server says of itself. Raises PeerUnavailable, AuthenticationError,
    RemoteProtocolError."""
    return await _ask(transport, endpoint, _question(access, endpoint), timeout)


async def measure_rtt(
    transport: Transport, access: Access, endpoint: Endpoint, timeout: float
) -> float:
    """Seconds there and back at best, without those for connecting. Raises as `ask` does."""
    question = _question(access, endpoint)
    await _ask(transport, endpoint, question, timeout)
    times = [await _timed(transport, endpoint, question, timeout) for _ in range(_TRIES)]
    return min(times)


async def _timed(
    transport: Transport, endpoint: Endpoint, question: bytes, timeout: float
) -> float:
    begin = time.perf_counter()  # uvloop's own clock counts whole milliseconds
    await _ask(transport, endpoint, question, timeout)
    return time.perf_counter() - begin


def _question(access: Access, endpoint: Endpoint) -> bytes:
    nonce, key = secrets.token_bytes(16), access.identity.public_key
    signed = opening_transcript(endpoint.peer_id, endpoint.certificate_digest, nonce, key)
    return encode(InfoRequest(nonce=nonce, credentials=access.sign_opening(signed)))


async def _ask(transport: Transport, endpoint: Endpoint, question: bytes, timeout: float) -> Info:
    answer = decode(await transport.call(endpoint, "info", question, timeout))
    if isinstance(answer, Refused):
        raise RemoteProtocolError(ErrorCode(answer.code), answer.message)
    if not isinstance(answer, Info):
        raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, f"'{answer.kind}' for an answer")
    return answer
