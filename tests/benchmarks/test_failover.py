"""What failover figures rest on: what counts as noticed and replayed, and injected failures."""

from __future__ import annotations

import asyncio
import random

from benchmarks.failover import milestones, replayed
from benchmarks.faults import Faulty
from benchmarks.hop import Seen, Tap
from swarm.errors import PeerUnavailable
from swarm.fakes import FakeNetwork
from swarm.messages import Message, Opened, Output, Step, Sync, Synced, TensorFrame
from swarm.transport import Endpoint, Service, Stream
from swarm.wire import encode

ENDPOINT = Endpoint("127.0.0.1", 1, "server", b"")


def _seen(at: float, message: Message) -> Seen:
    return Seen(at, "server", encode(message))


def _hidden(tokens: int) -> TensorFrame:
    return TensorFrame(dtype="float32", shape=(1, tokens, 1), data=bytes(4 * tokens))


def _step(at: float, number: int, start: int, tokens: int = 1) -> Seen:
    return _seen(at, Step(epoch=0, step=number, start=start, hidden=_hidden(tokens)))


def _output(at: float, number: int, start: int, *, pushed: bool) -> Seen:
    output = Output(epoch=0, step=number, start=start, hidden=_hidden(1), pushed=pushed)
    return _seen(at, output)


def test_only_what_a_server_had_been_told_before_is_replayed() -> None:
    """Not the prompt's pieces before, nor the step that was under way, nor a relayed one."""
    prompt = [_step(0, 0, 0, 8), _step(1, 1, 8, 8), _step(2, 2, 0, 8)]
    text = [_step(3, 3, 16), _step(4, 4, 17)]
    assert replayed([*prompt, *text, _step(5, 5, 17), _step(6, 6, 18), _step(7, 7, 18)], 2.5) == 0
    again = [_step(6, 5, 0, 10), _step(7, 6, 10, 7), _step(8, 7, 17), _step(9, 8, 18)]
    assert replayed([*prompt, *text, *again], 5.0) == 17


def test_a_pause_is_taken_apart_by_what_passed() -> None:
    tap = Tap(FakeNetwork().transport("client"))
    tap.sent += [_step(0, 0, 4), _step(2, 1, 5), _seen(3, Sync(epoch=1)), _step(6, 2, 0, 5)]
    tap.received += [
        _output(1, 0, 4, pushed=False),
        _seen(4, Synced(epoch=1, position=5, last_step=0)),
        _seen(5, Opened(protocol=1, window=8, max_step_tokens=64)),
        _output(7, 2, 4, pushed=False),  # of the past
        _output(8, 3, 5, pushed=True),  # not yet behind the last block
        _output(9, 3, 5, pushed=False),
    ]
    assert milestones(tap, 1.5) == (3, 5, 9)


def test_what_did_not_happen_takes_no_time() -> None:
    tap = Tap(FakeNetwork().transport("client"))
    assert milestones(tap, 1.5) == (1.5, 1.5, 1.5)


def test_a_failure_breaks_the_stream_in_both_directions() -> None:
    """As often as asked for; what is no answer to a step is never lost."""

    async def run() -> list[int]:
        network, broken = FakeNetwork(), asyncio.Event()

        async def session(stream: Stream) -> None:
            try:
                await stream.send(encode(Synced(epoch=0, position=0, last_step=0)))
                for number in range(1000):
                    await stream.send(_output(0, number, number, pushed=False).frame)
            finally:
                broken.set()

        async def nothing(_: object) -> bytes:
            return b""

        network.serve(ENDPOINT, Service(session, lambda _: asyncio.sleep(0), nothing))
        faults = Faulty(network.transport("client"), random.Random(1), 0.05)
        lengths: list[int] = []
        for count in range(1, 21):
            broken.clear()
            stream = await faults.open_stream(ENDPOINT, "session", 1.0)
            lengths.append(await _frames_until_failure(stream))
            assert faults.failures == count
            assert not stream.send_nowait(b"")
            await asyncio.wait_for(broken.wait(), 30.0)
        await network.close()
        return lengths

    lengths = asyncio.run(run())
    assert min(lengths) >= 1
    assert 10 < sum(lengths) / len(lengths) < 40


async def _frames_until_failure(stream: Stream) -> int:
    received = 0
    try:
        while await stream.receive():
            received += 1
    except PeerUnavailable as error:
        assert "injected" in str(error)  # noqa: PT017 - the count is what is asked for
    return received
