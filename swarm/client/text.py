"""What the servers of one session are to know, and the steps that tell them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from swarm.client.history import Borders, History
from swarm.client.hop import Hop, Terms
from swarm.client.steps import Cutter
from swarm.messages import Step, TensorFrame


@dataclass(slots=True)
class Text:
    """A session's past, its epoch, and the numbers of its steps; `patience` is in seconds."""

    terms: Terms
    borders: Borders
    cutter: Cutter
    patience: float  # of servers, after which a step need not be computed any more
    epoch: int = 0
    numbers: Iterator[int] = field(default_factory=itertools.count)
    trace: str = ""  # what the steps carry that are made now (`Step.trace`)

    def step(
        self,
        hop: Hop,
        begin: int,
        end: int,
        *,
        hidden: TensorFrame | None = None,
        reorder: tuple[int, ...] | None = None,
        crop: bool = False,
    ) -> Step:
        """Positions `[begin, end)` for a hop; `hidden` if they are at hand as a frame.

        With `crop` the hop forgets first what it holds from `begin` on.
        """
        if hidden is None:
            hidden = self.borders.read(hop.blocks.start, begin, end, self.terms.codec)
        return Step(
            epoch=self.epoch,
            step=next(self.numbers),
            start=begin,
            hidden=hidden,
            inputs=self.borders.read_inputs(begin, end),
            crop_to=begin if crop and hop.position > begin else None,
            reorder=reorder,
            trace=self.trace,
            deadline_ms=max(1, int(self.patience * 1000)),
        )


class Feed:
    """What one hop lacks until it has reached the end of a step, piece by piece.

    `known`: so many positions of what comes out are here already, and are computed for the server's
    cache only.
    """

    def __init__(self, hop: Hop, source: History, border: History, end: int, text: Text) -> None:
        self.hop = hop
        self._source, self._end = source, end
        self._text = text
        self.begin = min(hop.position, hop.trusted, border.length)
        self.known = border.length
        self._ends: list[int] = []  # of what was sent
        # Numbers of whole steps depend on how they were cut, hence they are.
        cuts = [self.known] if text.terms.whole_steps and self.begin < self.known < end else []
        cutter = text.cutter
        self._pieces = itertools.chain(
            *(cutter.pieces(*p, [hop]) for p in itertools.pairwise([self.begin, *cuts, end]))
        )
        self._next = next(self._pieces, None)

    @property
    def is_done(self) -> bool:
        return self._next is None and (not self._ends or self.hop.position >= self._end)

    @property
    def is_ready(self) -> bool:
        """What comes next is here, and the hop would take it."""
        window, ends = self.hop.window, self._ends
        free = len(ends) < window or self.hop.position >= ends[-window]
        return self._next is not None and free and self._source.length >= self._next[1]

    def take(self, reorder: tuple[int, ...] | None) -> Step:
        """The next piece; the first one says how far to go back, and applies `reorder`."""
        assert self._next is not None
        low, high = self._next
        first = not self._ends
        step = self._text.step(self.hop, low, high, reorder=reorder if first else None, crop=first)
        if first:
            self.hop.position = self.hop.trusted = low
        keep = high - self.known if low < self.known < high else None
        self._ends.append(high)
        self._next = next(self._pieces, None)
        return step.model_copy(update={"push": False, "quiet": high <= self.known, "keep": keep})


def feeds(hops: Sequence[Hop], answer: History, end: int, text: Text) -> list[Feed]:
    """For every hop that lacks something; `answer` is what comes out of the last one."""
    sources = [text.borders[hop.blocks.start] for hop in hops]
    borders = [*sources[1:], answer]
    found = (Feed(*parts, end, text) for parts in zip(hops, sources, borders, strict=True))
    return [feed for feed in found if not feed.is_done]
