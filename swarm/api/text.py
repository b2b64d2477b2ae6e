"""Tokens to text as they come: no half characters, nothing of a stop string, nor behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_HALF = "\N{REPLACEMENT CHARACTER}"  # how tokenizers show bytes that are no character yet
_MOST_HALF = 8  # tokens of which a character may be made; more are no character at all
_CONTEXT = 6  # tokens before the new ones that are decoded with them, for the spaces between

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Gives each character once it is complete. `decode` leaves special tokens out.

    `before` are the ids that the text goes on from: many tokenizers leave the blank out with which
    the first token begins.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        # The last ones: some that were shown, and all that were not.
        self._ids = list(before[-_CONTEXT:])
        self._shown = len(self._ids)  # so many of them

    def add(self, token: int) -> str:
        self._ids.append(token)
        return self._take(len(self._ids) - self._shown < _MOST_HALF)

    def end(self) -> str:
        """What is left, which may be half a character."""
        return self._take(False)

    def _take(self, wait: bool) -> str:
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        if wait and text.endswith(_HALF):
            return ""
        self._ids = self._ids[-_CONTEXT:]
        self._shown = len(self._ids)
        return text[len(before) :]


@dataclass(frozen=True, slots=True)
class Told:
    """A token, how likely it was, and where its text begins."""

    id: int
    logprob: float
    top: Sequence[tuple[int, float]]
    offset: int  # in characters of the answer


@dataclass(slots=True)
class Stopper:
    """Holds back what may become a stop string, and tells when one is there."""

    stops: Sequence[str]
    length: int = 0  # characters that were let out
    stopped: bool = False
    _held: str = ""
    _told: list[Told] = field(default_factory=list[Told])

    @property
    def end(self) -> int:
        """Where the next token's text begins."""
        return self.length + len(self._held)

    def tell(self, token: Told) -> None:
        """Of the token whose text is added next."""
        self._told.append(token)

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[Told]]:
        """What may be shown now. With `last` nothing is held back."""
        text = self._held + text
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = text[: min(found)], ""
        else:
            keep = 0 if last else max((_overlap(text, stop) for stop in self.stops), default=0)
            out, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.length += len(out)
        if self.stopped or not self._held:
            told = [t for t in self._told if t.offset < self.length or not self.stopped]
            self._told = []
        else:
            told = [t for t in self._told if t.offset < self.length]
            self._told = self._told[len(told) :]
        return out, told


def _overlap(text: str, stop: str) -> int:
    """Of how many of its first characters `text` ends with, without being all of them."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
