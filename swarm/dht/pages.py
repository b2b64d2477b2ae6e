"""Which page of the DHT a record lies on, and which pages a reader turns to: pure decisions.

The records of a model are sorted by first block into buckets. A bucket that grows is cut into
pages by hash of the peer id: 2, 4, 8, ... of them. A server writes the page of `bits` bits of its
hash and the one of a bit less, so that readers who are a step behind still find it; those on the
first page write the bucket's cover (no bits) as well, by which whoever knows nothing finds out how
many bits there are. So nobody handles more than a few pages, however large the swarm is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from statistics import median_low

MAX_BITS = 16
MAX_ON_PAGE = 256  # records that a node keeps of one page: who floods it gets no further
MAX_BUCKETS = 16  # of a model
LEAST_BLOCKS = 8  # in a bucket
_SPLIT, _MERGE = 32, 12  # records on a page: more are cut in two, fewer laid together
_HOPS_BACK = 2  # a server writes two sizes next to each other, so that no step leads past them


def bucket_of(block: int, num_blocks: int) -> int:
    """The bucket of servers whose first block this is."""
    return block // _blocks_per_bucket(num_blocks)


def count_buckets(num_blocks: int) -> int:
    return bucket_of(num_blocks - 1, num_blocks) + 1


def _blocks_per_bucket(num_blocks: int) -> int:
    return max(LEAST_BLOCKS, -(-num_blocks // MAX_BUCKETS))


def pages_of(peer_id: str, bits: int) -> tuple[str, ...]:
    """Where somebody writes who cuts a bucket into 2^`bits` pages: each as its bits, longest
    first. The cover is the empty one."""
    hashed = int.from_bytes(hashlib.sha256(peer_id.encode()).digest()[:2], "big")
    page = f"{hashed:016b}"[:bits]
    pages = {page: None, page[: max(0, bits - 1)]: None}
    if "1" not in page:
        pages[""] = None
    return tuple(pages)


def next_bits(bits: int, on_page: int, on_finer: int, on_coarser: int) -> int:
    """How finely to cut a bucket by somebody whose page of `bits` bits has so many records, and
    those of a bit more and a bit less so many: others may be ahead or behind."""
    if on_page > _SPLIT or is_ahead(on_finer):
        return min(MAX_BITS, bits + 1)
    return bits - 1 if bits and is_thin(on_page) and on_coarser < 2 * _MERGE else bits


def is_ahead(on_finer: int) -> bool:
    """Whether so many on a finer page than ours tell that the others cut so finely."""
    return 2 * on_finer > _SPLIT


def is_thin(on_page: int) -> bool:
    """Whether the coarser page must be counted, too."""
    return on_page < _MERGE


class Shelf:
    """One bucket as one reader knows it, who begins at a `place` of its own (16 bits)."""

    def __init__(self, place: int) -> None:
        self.bits = 0
        self.place = place
        self.rich = False  # enough was found for more to be elsewhere
        self._sent = False  # here by the cover, and nobody has been found since

    def pages(self, count: int | None) -> list[str]:
        """So many pages (None: all), from the reader's place on."""
        if not self.bits:
            return [""]
        total = 1 << self.bits
        first = self.place >> (MAX_BITS - self.bits)
        some = total if count is None else min(count, total)
        pages = [f"{(first + i) % total:0{self.bits}b}" for i in range(some)]
        if count is None and self.bits >= _HOPS_BACK:  # not all cut alike
            pages += dict.fromkeys(page[:-_HOPS_BACK] for page in pages)
        return pages

    def finer_page(self, more_bits: int) -> str:
        """Where somebody would be who cuts so much more finely: liars may have kept us from it."""
        return f"{self.place:016b}"[: self.bits + more_bits]

    def learn(self, claims: Sequence[int], pages: int) -> bool:
        """Heed how finely the living cut who were found on so many pages; whether to turn to other
        pages at once.

        Only the cover may send a reader far. Beyond it pages show by themselves whether they are
        used: who finds nobody there goes back step by step, so that lies cost a few questions.
        """
        self.rich = len(claims) >= _MERGE
        if not self.bits:
            self.bits = median_low(claims) if claims else 0
            self._sent = self.bits > 0
            return self._sent
        if 2 * len(claims) >= _MERGE * pages:
            self._sent = False
            said = sorted(bits for bits in claims if bits >= self.bits) or [self.bits]
            self.bits = said[len(said) // 10]  # who is a step ahead is seen from here
            return False
        if claims and self._sent:
            return False
        self.bits = max(0, self.bits - _HOPS_BACK) if self._sent else 0
        return True

    def turn_to(self, page: str, on_page: int) -> None:
        """Go on from a finer page, if it turned out to be used."""
        if 2 * on_page >= _MERGE:
            self.bits = len(page)
