"""However many servers there are, nobody handles more than some pages, and nobody is lost."""

import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.dht.pages import (
    MAX_BITS,
    MAX_BUCKETS,
    Shelf,
    bucket_of,
    count_buckets,
    is_ahead,
    next_bits,
    pages_of,
)

NAMES = [f"server{i}" for i in range(3000)]


class Bucket:
    """Servers of one bucket, each of which counts its page, as announcers do."""

    def __init__(self, count: int) -> None:
        self.bits: dict[str, int] = {}
        self.pages: dict[str, set[str]] = defaultdict(set)
        for name in NAMES[:count]:
            self.write(name, 0)

    def write(self, name: str, bits: int | None) -> None:
        for page in pages_of(name, self.bits.pop(name, 0)):
            self.pages[page].discard(name)
        if bits is not None:
            self.bits[name] = bits
            for page in pages_of(name, bits):
                self.pages[page].add(name)

    def page(self, page: str) -> set[str]:
        return self.pages.get(page, set())

    def survey(self, names: list[str], rng: random.Random) -> None:
        """What announcers do."""
        for name in names:
            bits, more = self.bits[name], rng.choice((1, 3, 5))
            mine, finer, coarser = (
                len(self.page(pages_of(name, n)[0])) for n in (bits, bits + more, max(0, bits - 1))
            )
            bits += more - 1 if is_ahead(finer) else 0
            self.write(name, next_bits(bits, mine, finer, coarser))

    def read(self, shelf: Shelf, count: int | None) -> set[str]:
        """A look as the directory makes it."""
        seen: set[str] = set()
        read: set[str] = set()
        for _ in range(10):
            pages = [page for page in shelf.pages(count) if page not in read]
            read.update(pages)
            found = [name for page in pages for name in self.page(page)]
            seen.update(found)
            if not pages or not shelf.learn([self.bits[name] for name in found], len(pages)):
                break
        assert len(read) <= 10 or count is None
        return seen


@given(st.integers(1, 4096), st.integers(0, 4095))
def test_a_model_has_a_bounded_number_of_buckets(num_blocks: int, block: int) -> None:
    assert count_buckets(num_blocks) <= MAX_BUCKETS
    assert bucket_of(min(block, num_blocks - 1), num_blocks) < count_buckets(num_blocks)
    assert bucket_of(7, 80) == 0
    assert bucket_of(8, 80) == 1


@given(st.sampled_from(NAMES), st.integers(0, MAX_BITS))
def test_a_server_writes_few_pages_and_a_bit_coarser_ones_too(name: str, bits: int) -> None:
    pages = list(pages_of(name, bits))
    assert len(pages) <= 3
    assert {len(page) for page in pages} <= {bits, bits - 1, 0}
    if bits:
        assert pages[0].startswith(pages[1])
    assert ("" in pages) == (bits < 2 or "1" not in pages[0])


@pytest.mark.parametrize("count", [3, 60, 400])
def test_pages_stay_small_and_readers_find_their_way(count: int) -> None:
    """Servers come all at once, count their pages by and by, and go again."""
    rng, bucket = random.Random(count), Bucket(count)
    old_reader, place = Shelf(rng.randrange(1 << 16)), rng.randrange(1 << 16)
    for _ in range(40):
        bucket.survey(rng.sample(NAMES[:count], max(1, count // 4)), rng)
        assert bucket.read(old_reader, 2)
    sizes = [len(bucket.page(pages_of(name, bits)[0])) for name, bits in bucket.bits.items()]
    assert max(sizes) <= 60
    for shelf in (old_reader, Shelf(place)):
        seen = bucket.read(shelf, 2)
        assert min(count, 24) <= len(seen) <= 4 * 60
        assert len(bucket.read(shelf, None)) >= 0.98 * count
    rest = NAMES[: count // 8 + 1]
    for name in NAMES[len(rest) : count]:
        bucket.write(name, None)
    for _ in range(40):
        bucket.survey(rng.sample(rest, max(1, len(rest) // 4)), rng)
        assert bucket.read(old_reader, 2)
    assert len(bucket.read(Shelf(place), None)) >= 0.98 * len(rest)


LIARS = [name for name in (f"liar{i}" for i in range(10_000)) if "1" not in pages_of(name, 8)[0]]


@pytest.mark.parametrize("lie", [0, 1, 5, 15, 16])
def test_lies_on_the_cover_cost_questions_and_hide_nobody_for_long(lie: int) -> None:
    bucket = Bucket(400)
    for _ in range(8):
        bucket.survey(list(bucket.bits), random.Random(1))
    honest = set(bucket.bits)
    for name in LIARS:
        bucket.write(name, lie)
    shelf = Shelf(random.Random(0).randrange(1 << 16))
    assert bucket.read(shelf, 2) & honest
    for more in (2, 4, 6):  # what the directory tries one after the other
        if shelf.rich:
            page = shelf.finer_page(more)
            shelf.turn_to(page, len(bucket.page(page)))
    assert len(bucket.read(shelf, 2) & honest) >= 24


def test_an_empty_bucket_is_looked_at_once() -> None:
    shelf = Shelf(7)
    assert shelf.pages(2) == [""]
    assert not shelf.learn([], 1)
