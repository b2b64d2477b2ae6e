"""Pictures of swarms of a thousand servers: bounded, without holes, and hard to narrow by lies."""

import asyncio
import random

import pytest

from simulation.pages import Bucket
from swarm.dht import directory as directory_module
from swarm.dht.directory import Directory, SwarmView
from swarm.dht.memory import MemoryDht
from swarm.dht.pages import bucket_of, pages_of
from swarm.dht.records import ServerRecord, dht_key
from swarm.types import BlockRange
from tests.client.market import MODEL, server
from tests.dht.samples import NOW

BLOCKS, SERVERS = 32, 1000  # in four buckets


class Crowd:
    """Servers on the pages of a DHT in memory. Records are not signed: keys take long to make."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, servers: int = SERVERS, last: int = BLOCKS
    ) -> None:
        self.records: dict[bytes, ServerRecord] = {}
        self.dht = MemoryDht("reader")
        monkeypatch.setattr(
            directory_module, "open_record", lambda data, **_: self.records[bytes(data)]
        )
        rng = random.Random(1)
        spans = [BlockRange(start, start + 4) for start in range(last - 3)]
        chosen = {f"server{i}": rng.choice(spans) for i in range(servers)}
        for start in range(0, BLOCKS, 8):
            names = [name for name, blocks in chosen.items() if start <= blocks.start < start + 8]
            bucket = Bucket(names)
            bucket.settle(rng)
            for name, bits in bucket.bits.items():
                self.put(name, chosen[name], bits)
            self.last = bucket

    def put(self, name: str, blocks: BlockRange, bits: int) -> None:
        fields = {"num_blocks": BLOCKS, "page_bits": bits, "announced_at": int(NOW * 1000)}
        self.records[name.encode()] = server(name, str(blocks), **fields).record
        for page in pages_of(name, bits):
            key = dht_key(MODEL, bucket_of(blocks.start, BLOCKS), page, None)
            self.dht.values.setdefault(key, {})[name] = (name.encode(), NOW + 1e6)

    def reader(self, seed: int = 0, *, whole: bool = False) -> Directory:
        rng = random.Random(seed)
        return Directory(self.dht, MODEL, BLOCKS, lambda: 0.0, whole=whole, rng=rng)

    def look(self, reader: Directory) -> tuple[SwarmView, int]:
        """The picture, and how many pages it took."""
        self.dht.asked.clear()
        view = asyncio.run(reader.refresh())
        return view, sum(map(len, self.dht.asked))


def test_a_client_reads_a_part_and_sees_holders_of_every_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowd = Crowd(monkeypatch)
    pictures: set[frozenset[str]] = set()
    for seed in range(5):
        reader = crowd.reader(seed)
        crowd.look(reader)
        view, pages = crowd.look(reader)
        assert pages <= 4 * 2 + 1
        assert 100 < len(view.servers) < 600
        assert min(len(view.holders(block)) for block in range(1, BLOCKS - 1)) >= 3
        assert not view.missing_blocks()
        pictures.add(frozenset(s.record.peer_id for s in view.servers))
    assert len(pictures) == 5  # not all go to the same servers


def test_a_block_that_only_one_server_holds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(monkeypatch, last=BLOCKS - 1)
    crowd.last.write("rare", 0)
    for _ in range(12):
        crowd.last.survey(["rare"], random.Random(2))
    crowd.put("rare", BlockRange(28, BLOCKS), crowd.last.bits["rare"])
    for seed in range(5):
        view, pages = crowd.look(crowd.reader(seed))
        assert pages <= 4 * 16
        assert view.holders(BLOCKS - 1)


def test_whoever_places_blocks_sees_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(monkeypatch)
    reader = crowd.reader(whole=True)
    crowd.look(reader)
    view, pages = crowd.look(reader)
    assert len(view.servers) >= 0.98 * SERVERS
    assert pages <= SERVERS / 8


def test_a_small_swarm_costs_a_look_at_each_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(monkeypatch, 30)
    view, pages = crowd.look(crowd.reader())
    assert len(view.servers) == 30
    assert pages == 4


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_liars_on_the_cover_hide_the_others_from_nobody_for_long(
    monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """Sixty of them, who say that they cut coarsely, or finely, and are read by all first."""
    crowd = Crowd(monkeypatch)
    names = (f"liar{i}" for i in range(40_000))
    first = [name for name in names if "1" not in pages_of(name, max(bits, 1))[0]][:60]
    for name in first:
        crowd.put(name, BlockRange(0, 8), bits)
    reader = crowd.reader(3)
    honest = 0
    for _ in range(20):  # ten minutes
        view, _ = crowd.look(reader)
        honest = sum(s.record.peer_id not in first for s in view.holders(3))
    assert honest >= 10
