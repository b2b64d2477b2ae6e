"""Tokens for asyncio callers in any event loop: an object per text, one wake-up for many tokens."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from swarm.client.hop import Hop
from swarm.client.sampling import Token
from swarm.client.session import RemoteSession
from swarm.errors import SessionClosed
from swarm.loop import BackgroundLoop


@dataclass(slots=True)
class Journey:
    """The session that a text goes through, once it is there."""

    remote: RemoteSession | None = None


Decode = Callable[[Journey, Callable[[Token], None]], Coroutine[Any, Any, Any]]
"""Decodes a text on the background loop, says over what, and calls what it is given with every
token."""


class TokenStream:
    """`async for token in stream` gives every new `Token` of a text as soon as it is there.

    Decoding begins when the first one is asked for, and does not wait for its consumer. Leaving the
    loop early, cancelling the task that waits in it, and `cancel` stop it and free the servers at
    once. For one consumer in one event loop.
    """

    def __init__(self, background: BackgroundLoop, decode: Decode) -> None:
        self._background = background
        self._decode = decode
        self._running: Future[Any] | None = None
        self._inbox: _Inbox | None = None
        self._journey = Journey()

    @property
    def hops(self) -> Sequence[Hop]:
        """The route as it is now; a hop whose `failure` is not None is about to be replaced."""
        return [] if self._journey.remote is None else list(self._journey.remote.hops)

    @property
    def recoveries(self) -> int:
        """How often a hop was replaced."""
        return 0 if self._journey.remote is None else self._journey.remote.recoveries

    @property
    def moves(self) -> int:
        """How often a server that left handed the text over, so that nothing was replayed."""
        return 0 if self._journey.remote is None else self._journey.remote.tending.moves

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Token:
        """Raises what `generate` raises, and SessionClosed after `cancel`."""
        if self._inbox is None:
            self._inbox = self._begin()
        try:
            return await self._inbox.get()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stop decoding and free the servers; from any thread, any number of times."""
        if self._running is not None:
            self._running.cancel()

    def __del__(self) -> None:
        self.cancel()

    def _begin(self) -> _Inbox:
        loop = asyncio.get_running_loop()
        inbox = _Inbox()  # the work must not keep us alive: who drops a stream cancels it
        mail = _mails.setdefault(loop, _Mail(loop))
        work = self._decode(self._journey, lambda token: mail.send(inbox, token))
        self._running = self._background.start(work)

        def ended(running: Future[Any]) -> None:
            with suppress(RuntimeError):  # the consumer's loop is closed
                loop.call_soon_threadsafe(inbox.end, running)

        self._running.add_done_callback(ended)
        return inbox


class _Inbox:
    """What has arrived for one consumer; for its loop only."""

    def __init__(self) -> None:
        self._tokens: deque[Token] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._end: BaseException | None = None

    async def get(self) -> Token:
        while not self._tokens:
            if self._end is not None:
                raise self._end
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._tokens.popleft()

    def put(self, token: Token) -> None:
        self._tokens.append(token)
        self._wake()

    def end(self, running: Future[Any]) -> None:
        if running.cancelled():
            self._end = SessionClosed("the stream was cancelled")
        else:
            self._end = running.exception() or StopAsyncIteration()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Mail:
    """Brings the tokens of one round of the background loop to a consumer's loop together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._letters: list[tuple[_Inbox, Token]] = []

    def send(self, inbox: _Inbox, token: Token) -> None:
        if not self._letters:
            asyncio.get_running_loop().call_soon(self._post)
        self._letters.append((inbox, token))

    def _post(self) -> None:
        letters, self._letters = self._letters, []
        loop = self._loop()
        if loop is not None:
            with suppress(RuntimeError):  # closed; streams without consumers are cancelled
                loop.call_soon_threadsafe(_deliver, letters)


def _deliver(letters: list[tuple[_Inbox, Token]]) -> None:
    for inbox, token in letters:
        inbox.put(token)


_mails: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mail] = weakref.WeakKeyDictionary()
