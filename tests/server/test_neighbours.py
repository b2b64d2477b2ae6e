"""A server knows how far those are who can follow it, asks few, and announces the nearest."""

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from swarm.dht.directory import Directory
from swarm.dht.memory import MemoryDht
from swarm.dht.records import MAX_NEXT_RTTS, ServerRecord, ServerState, SignedRecord, peer_tag
from swarm.errors import PeerUnavailable
from swarm.server.neighbours import Neighbours, choose_probes, likely_next, pack
from swarm.transport import Endpoint
from swarm.types import BlockRange, ModelId, Numerics

MODEL = ModelId("tiny", "0" * 64)


def record(name: str, blocks: str, **fields: object) -> ServerRecord:
    usual: dict[str, object] = {
        "peer_id": name,
        "model": MODEL,
        "blocks": BlockRange.parse(blocks),
        "num_blocks": 24,
        "host": name,
        "port": 1,
        "certificate_digest": bytes(32),
    }
    return ServerRecord.model_validate(usual | fields)


ME = record("myself00", "0:8")


def test_only_those_are_asked_who_can_follow() -> None:
    able = [record("next", "8:16"), record("overlap", "4:12"), record("around", "0:24")]
    unable = [
        ME,
        record("same", "0:8"),
        record("later", "9:16"),
        record("half", "8:16", numerics=Numerics("bfloat16")),
        record("gone", "8:16", state=ServerState.DRAINING),
    ]
    assert likely_next(ME, [*able, *unable]) == able
    assert likely_next(record("last", "16:24"), [*able, record("first", "0:8")]) == [
        able[2],
        record("first", "0:8"),
    ]


@given(st.dictionaries(st.text("abcdefgh", min_size=8, max_size=8), st.floats(0.0, 1e9)))
def test_the_nearest_are_announced_in_what_a_record_may_hold(rtts: dict[str, float]) -> None:
    packed = pack(rtts)
    assert record("anybody0", "0:8", next_rtts=packed).next_rtts == packed
    assert len(packed) == min(len(rtts), MAX_NEXT_RTTS)
    farthest = max((rtts[name] for name in packed), default=0.0)
    assert all(rtts[name] >= farthest for name in rtts.keys() - packed.keys())


def test_half_of_the_questions_go_to_others_than_those_announced() -> None:
    likely = [record(f"server{i:02}", "8:16") for i in range(20)]
    rtts = {other.peer_id: 0.1 for other in likely[:6]}
    rng = random.Random(0)
    asked = [choose_probes(likely, rtts, None, 4, rng) for _ in range(200)]
    assert all(len({other.peer_id for other in chosen}) == 4 for chosen in asked)
    assert all(sum(other.peer_id in rtts for other in chosen) == 2 for chosen in asked)
    assert {other.peer_id for chosen in asked for other in chosen} == {r.peer_id for r in likely}
    assert len(choose_probes(likely[:6], rtts, None, 4, rng)) == 4
    assert len(choose_probes(likely[:3], {}, None, 4, rng)) == 3


def test_whom_coordinates_put_near_are_asked_before_others() -> None:
    likely = [record(f"server{i:02}", "8:16", coordinates=(50 * i, 0, 0, 10)) for i in range(40)]
    rtts = {other.peer_id: 0.1 for other in likely[:6]}
    asked = [
        choose_probes(likely, rtts, (0.0, 0.0, 0.0, 0.001), 4, random.Random(seed))
        for seed in range(20)
    ]
    assert all(len({other.peer_id for other in chosen}) == 4 for chosen in asked)
    assert all("server06" in {other.peer_id for other in chosen} for chosen in asked)
    assert len({chosen[3].peer_id for chosen in asked}) > 5  # one by lot


def neighbours(rtts: dict[str, float]) -> Neighbours:
    async def measure(endpoint: Endpoint) -> float:
        if endpoint.peer_id not in rtts:
            raise PeerUnavailable(f"{endpoint}: connection refused")
        return rtts[endpoint.peer_id]

    async def weigh(endpoint: Endpoint) -> float:
        return 1e6 / rtts[endpoint.peer_id]

    directory = Directory(MemoryDht("myself00"), MODEL, 24)
    return Neighbours(directory, lambda: ME, measure, weigh, random.Random(0))


def test_rounds_keep_up_with_who_is_there_and_how_far() -> None:
    rtts = {"nextone0": 0.0123, "nexttwo0": 0.2}
    mine = neighbours(rtts)
    servers = [SignedRecord(record(name, "8:16"), b"") for name in ("nextone0", "nexttwo0", "dead")]
    asyncio.run(mine.look(servers, 8))
    assert mine.next_rtts == {peer_tag("nextone0"): 12, peer_tag("nexttwo0"): 200}
    assert mine.uplink == int(
        1e6 / 0.0123 / 1024
    )  # the best counts: others' lines may be slower than ours
    assert mine.coordinates is not None
    rtts["nextone0"] = 0.1
    for _ in range(30):
        asyncio.run(mine.look(servers, 8))
    assert 98 <= mine.next_rtts[peer_tag("nextone0")] <= 100
    del rtts["nexttwo0"]
    asyncio.run(mine.look(servers, 8))
    assert mine.next_rtts.keys() == {peer_tag("nextone0")}
    asyncio.run(mine.look(servers[1:], 8))  # it has left, or moved
    assert mine.next_rtts == {}
