"""One state, numbered, for any number of readers: whole for who comes, then only what changes.

Changes are JSON merge patches (RFC 7396). A reader who cannot follow is told to begin anew.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from swarm.web import event

Json = dict[str, Any]

_KEPT = 64  # patches, for who asks for the state and then for what came after it
_AT_LEAST = 0.25  # seconds between two patches for one reader


class Feed:
    """`publish` the state as often as it may have changed; it must hold no null."""

    def __init__(self, state: Json) -> None:
        self.state = state
        self.readers = 0
        self.run = secrets.token_hex(4)  # numbers of another run mean something else
        self.number = 0
        self._patches: deque[tuple[int, bytes]] = deque(maxlen=_KEPT)
        self._whole: dict[bool, bytes] = {}  # by whether compressed
        self._changed = asyncio.Event()

    def publish(self, state: Json) -> None:
        patch = difference(self.state, state)
        if not patch:
            return
        self.number += 1
        self.state = state
        self._patches.append((self.number, dump({"number": self.number, "patch": patch})))
        self._whole.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    def whole(self, *, compressed: bool) -> bytes:
        """The state as JSON, made once for all who ask."""
        if compressed not in self._whole:
            told: Json = {"run": self.run, "number": self.number, **self.state}
            self._whole[compressed] = dump(told, compressed=compressed)
        return self._whole[compressed]

    async def follow(self, run: str, number: int) -> AsyncGenerator[bytes]:
        """Events from after `number` on; `reset` as the last one if that is too long ago."""
        self.readers += 1
        try:
            while True:
                missed = self.number - number
                if run != self.run or not 0 <= missed <= len(self._patches):
                    yield event("{}", "reset")
                    return
                if not missed:
                    await self._changed.wait()
                    continue
                for self_number, patch in list(self._patches)[-missed:]:
                    number = self_number
                    yield event(patch.decode(), "patch")
                await asyncio.sleep(_AT_LEAST)
        finally:
            self.readers -= 1


def difference(before: Json, after: Json) -> Json:
    """The merge patch that makes `after` of `before`."""
    patch: Json = dict.fromkeys(before.keys() - after.keys())
    for key, new in after.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := difference(old, new):
                patch[key] = inner
        elif old != new or key not in before:
            patch[key] = new
    return patch


def dump(value: Json, *, compressed: bool = False) -> bytes:
    """As JSON, for who takes gzip compressed."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return gzip.compress(data, 5) if compressed else data
