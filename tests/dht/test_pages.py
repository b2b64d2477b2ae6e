"""However many servers there are, nobody handles more than some pages, and nobody is lost."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.pages import Bucket
from swarm.dht.pages import MAX_BITS, MAX_BUCKETS, Shelf, bucket_of, count_buckets, pages_of

NAMES = [f"server{i}" for i in range(3000)]


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
    rng, names = random.Random(count), NAMES[:count]
    bucket, place = Bucket(names), random.Random(1).randrange(1 << 16)
    old_reader = Shelf(rng.randrange(1 << 16))
    for _ in range(40):
        bucket.settle(rng, 1)
        seen, read = bucket.read(old_reader, 2)
        assert seen
        assert len(read) <= 10
    assert max(len(bucket.page(pages_of(*server)[0])) for server in bucket.bits.items()) <= 60
    for shelf in (old_reader, Shelf(place)):
        seen, _ = bucket.read(shelf, 2)
        assert min(count, 12) <= len(seen) <= 4 * 60
        assert len(bucket.read(shelf, None)[0]) >= 0.98 * count
    rest = names[: count // 8 + 1]
    for name in names[len(rest) :]:
        bucket.write(name, None)
    for _ in range(40):
        bucket.settle(rng, 1)
        assert bucket.read(old_reader, 2)[0]
    assert len(bucket.read(Shelf(place), None)[0]) >= 0.98 * len(rest)


LIARS = [name for name in (f"liar{i}" for i in range(10_000)) if "1" not in pages_of(name, 8)[0]]


@pytest.mark.parametrize("lie", [0, 1, 5, 15, 16])
def test_lies_on_the_cover_cost_questions_and_hide_nobody_for_long(lie: int) -> None:
    bucket = Bucket(NAMES[:400])
    bucket.settle(random.Random(1))
    honest = set(bucket.bits)
    for name in LIARS:
        bucket.write(name, lie)
    shelf = Shelf(random.Random(0).randrange(1 << 16))
    assert bucket.read(shelf, 2)[0] & honest
    for more in (2, 4, 6):  # what the directory tries one after the other
        if shelf.rich:
            page = shelf.finer_page(more)
            shelf.turn_to(page, len(bucket.page(page)))
    assert len(bucket.read(shelf, 2)[0] & honest) >= 12


def test_an_empty_bucket_is_looked_at_once() -> None:
    shelf = Shelf(7)
    assert shelf.pages(2) == [""]
    assert not shelf.learn([], 1)
