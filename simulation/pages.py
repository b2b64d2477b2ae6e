"""One bucket of a model's records in the DHT, as servers write it and readers find their way in it.

The decisions are those of `swarm/dht/pages.py`; who makes them when is `swarm/dht/announcer.py` and
`directory.py`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

from swarm.dht.pages import Shelf, is_ahead, next_bits, pages_of


class Bucket:
    """Servers of one bucket, each of which counts its page, as announcers do."""

    def __init__(self, names: Iterable[str]) -> None:
        self.bits: dict[str, int] = {}
        self.pages: dict[str, set[str]] = defaultdict(set)
        for name in names:
            self.write(name, 0)

    def write(self, name: str, bits: int | None) -> None:
        """None: it leaves."""
        for page in pages_of(name, self.bits.pop(name, 0)):
            self.pages[page].discard(name)
        if bits is not None:
            self.bits[name] = bits
            for page in pages_of(name, bits):
                self.pages[page].add(name)

    def page(self, page: str) -> set[str]:
        return self.pages.get(page, set())

    def survey(self, names: Iterable[str], rng: random.Random) -> None:
        for name in names:
            bits, more = self.bits[name], rng.choice((1, 3, 5))
            mine, finer, coarser = (
                len(self.page(pages_of(name, n)[0])) for n in (bits, bits + more, max(0, bits - 1))
            )
            bits += more - 1 if is_ahead(finer) else 0
            self.write(name, next_bits(bits, mine, finer, coarser))

    def settle(self, rng: random.Random, rounds: int = 40) -> None:
        """A quarter of them surveys in each round."""
        names = list(self.bits)
        for _ in range(rounds):
            self.survey(rng.sample(names, -(-len(names) // 4)), rng)

    def read(self, shelf: Shelf, count: int | None) -> tuple[set[str], list[str]]:
        """A look: who is found, and the pages that were read, in order."""
        seen, read = set[str](), list[str]()
        for _ in range(10):
            pages = [page for page in shelf.pages(count) if page not in read]
            read += pages
            found = [name for page in pages for name in self.page(page)]
            seen.update(found)
            if not pages or not shelf.learn([self.bits[name] for name in found], len(pages)):
                break
        return seen, read
