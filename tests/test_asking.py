"""A question about a server is answered by that server, or there is an error of ours."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from swarm.asking import ask, measure_rtt, measure_uplink
from swarm.errors import (
    AuthenticationError,
    ErrorCode,
    PeerUnavailable,
    RemoteProtocolError,
    SwarmError,
)
from swarm.fakes import FakeNetwork
from swarm.identity import Access, Identity
from swarm.messages import MAX_PADDING, Info, InfoRequest, Load, Refused, Sync
from swarm.transport import Endpoint, Service
from swarm.wire import decode, encode

ME = Access(Identity.ephemeral(), None)
THERE = Endpoint("h", 1, "server", bytes(32))
INFO = Info(record=b"r", load=Load(queue=3))


def questioned(answer: bytes, what: str = "ask", at: Endpoint = THERE) -> tuple[Any, int]:
    """What comes of a question when a server answers so, and how often it was asked."""
    asked = 0

    async def info(question: bytes) -> bytes:
        nonlocal asked
        asked += 1
        assert isinstance(decode(question), InfoRequest)
        return answer

    async def main() -> Any:
        network = FakeNetwork()
        network.serve(THERE, Service(lambda _: asyncio.sleep(0), lambda _: asyncio.sleep(0), info))
        question: dict[str, Coroutine[Any, Any, Any]] = {
            "ask": ask(network.transport("me"), ME, at, 1.0),
            "measure": measure_rtt(network.transport("me"), ME, at, 1.0),
            "weigh": measure_uplink(network.transport("me"), ME, at, 1.0),
        }
        try:
            return await question.pop(what)
        finally:
            for other in question.values():
                other.close()
            await network.close()

    return asyncio.run(main()), asked


def test_a_server_says_what_it_is_and_how_far() -> None:
    assert questioned(encode(INFO)) == (INFO, 1)
    rtt, asked = questioned(encode(INFO), "measure")
    assert 0 < rtt < 1
    assert asked == 3
    rate, asked = questioned(encode(INFO), "weigh")
    assert MAX_PADDING / 1.0 < rate < 1e9
    assert asked == 4


@pytest.mark.parametrize(
    ("answer", "at", "error"),
    [
        (encode(Refused(code=ErrorCode.UNAUTHORIZED, message="no")), THERE, RemoteProtocolError),
        (encode(Sync(epoch=1)), THERE, RemoteProtocolError),
        (b"garbage", THERE, RemoteProtocolError),
        (encode(INFO), Endpoint("h", 2, "server", bytes(32)), PeerUnavailable),
        (encode(INFO), Endpoint("h", 1, "another", bytes(32)), AuthenticationError),
    ],
    ids=["refused", "another message", "garbage", "nowhere", "somebody else"],
)
@pytest.mark.parametrize("what", ["ask", "measure", "weigh"])
def test_whatever_else_comes_is_an_error_of_ours(
    what: str, answer: bytes, at: Endpoint, error: type[SwarmError]
) -> None:
    with pytest.raises(error):
        questioned(answer, what, at)
