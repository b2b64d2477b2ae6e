"""Asks a server about itself, how far it is and how fast the line there: for clients, and for
servers about next hops."""

from __future__ import annotations

import secrets
import time

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.identity import Access
from swarm.messages import MAX_PADDING, Info, InfoRequest, Refused
from swarm.transport import Endpoint, Transport
from swarm.wire import decode, encode

_TRIES = 2  # others may connect at the same moment, and a cold TCP connection sends little at once
_SHORTEST = 1e-4  # seconds; to tell shorter ones, more would have to be sent


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


async def measure_uplink(
    transport: Transport, access: Access, endpoint: Endpoint, timeout: float
) -> float:
    """Bytes per second to a server, beside all else that is sent now. Raises as `ask` does."""
    question = _question(access, endpoint)
    await _ask(transport, endpoint, question, timeout)
    rtt = await _timed(transport, endpoint, question, timeout)
    padded = _question(access, endpoint, bytes(MAX_PADDING))
    times = [await _timed(transport, endpoint, padded, timeout) for _ in range(_TRIES)]
    return MAX_PADDING / max(min(times) - rtt, _SHORTEST)


async def _timed(
    transport: Transport, endpoint: Endpoint, question: bytes, timeout: float
) -> float:
    begin = time.perf_counter()  # uvloop's own clock counts whole milliseconds
    await _ask(transport, endpoint, question, timeout)
    return time.perf_counter() - begin


def _question(access: Access, endpoint: Endpoint, padding: bytes = b"") -> bytes:
    nonce = secrets.token_bytes(16)
    credentials = access.sign_for(endpoint.peer_id, endpoint.certificate_digest, nonce)
    return encode(InfoRequest(nonce=nonce, credentials=credentials, padding=padding))


async def _ask(transport: Transport, endpoint: Endpoint, question: bytes, timeout: float) -> Info:
    answer = decode(await transport.call(endpoint, "info", question, timeout))
    if isinstance(answer, Refused):
        raise RemoteProtocolError(ErrorCode(answer.code), answer.message)
    if not isinstance(answer, Info):
        raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, f"'{answer.kind}' for an answer")
    return answer
