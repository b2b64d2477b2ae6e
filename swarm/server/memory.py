"""Who may open a session when memory for keys and values is short: first come, first served.

Pure: promises are counted here, pages where they lie (models/storage.py). A session is promised
what it may ever need; most end before, so that more may be promised than there is. No client is
promised more than there is, and none has more than half of the sessions: others come in, too.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError


class Admission:
    """`budget` is in bytes; up to `overcommit` times as many are promised."""

    def __init__(self, budget: int, overcommit: float, max_sessions: int) -> None:
        self.budget = budget
        self._max_sessions = max_sessions
        self.limit = int(budget * overcommit)
        self.promised = 0
        self._held: dict[bytes, int] = {}
        self._waiting: OrderedDict[bytes, int] = OrderedDict()
        self._clients: dict[bytes, str] = {}
        self._bytes: Counter[str] = Counter()  # of each client, those it waits for included
        self._sessions: Counter[str] = Counter()

    def __len__(self) -> int:
        """Sessions, and those who wait to become one."""
        return len(self._held) + len(self._waiting)

    @property
    def free(self) -> int:
        """Bytes that could be promised now; 0 while somebody waits."""
        return 0 if self._waiting else self.limit - self.promised

    def ask(self, session_id: bytes, client: str, nbytes: int) -> bool:
        """Whether it may begin at once; else it has a place in the queue.

        Raises RemoteProtocolError: TOO_LONG if it can never fit, OUT_OF_ORDER if it is known, BUSY
        if there are too many, or the client has its share.
        """
        if session_id in self._held or session_id in self._waiting:
            raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "this session is open already")
        if nbytes > self.budget:
            raise RemoteProtocolError(
                ErrorCode.TOO_LONG,
                f"{nbytes:,} bytes of cache asked for; this server has {self.budget:,}",
            )
        if len(self) >= self._max_sessions:
            raise RemoteProtocolError(ErrorCode.BUSY, "too many sessions", retry_after=1.0)
        if (
            self._bytes[client] + nbytes > self.budget
            or self._sessions[client] >= self._max_sessions // 2
        ):
            raise RemoteProtocolError(
                ErrorCode.BUSY, "your sessions have your share of this server", retry_after=1.0
            )
        self._clients[session_id] = client
        self._bytes[client] += nbytes
        self._sessions[client] += 1
        self._waiting[session_id] = nbytes
        return session_id in self._admit()

    def leave(self, session_id: bytes) -> list[bytes]:
        """Give back a promise, or a place in the queue. Who may begin now, in order."""
        client = self._clients.pop(session_id, None)
        if client is None:
            raise LocalProtocolError("gave back a promise that nobody has")
        if session_id in self._held:
            nbytes = self._held.pop(session_id)
            self.promised -= nbytes
        else:
            nbytes = self._waiting.pop(session_id)
        self._bytes[client] -= nbytes
        self._sessions[client] -= 1
        if not self._sessions[client]:
            del self._bytes[client], self._sessions[client]
        return self._admit()

    def _admit(self) -> list[bytes]:
        """The queue is strict: a large session is not overtaken for ever by small ones."""
        admitted: list[bytes] = []
        while self._waiting:
            session_id, nbytes = next(iter(self._waiting.items()))
            if self.promised + nbytes > self.limit:
                break
            del self._waiting[session_id]
            self._held[session_id] = nbytes
            self.promised += nbytes
            admitted.append(session_id)
        return admitted

    def check_integrity(self) -> None:
        """Raises LocalProtocolError if promises do not add up."""
        if not sum(self._held.values()) == self.promised <= self.limit:
            raise LocalProtocolError(f"{self.promised} of {self.limit} bytes promised")
        asked = sum(self._held.values()) + sum(self._waiting.values())
        if (self._bytes.total(), self._sessions.total()) != (asked, len(self)):
            raise LocalProtocolError("clients are charged for more or less than they asked for")
