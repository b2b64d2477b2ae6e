"""Who may keep how many bytes of steps waiting, so that a flood by some leaves room for others.

Dynamic thresholds: A. Choudhury and E. Hahne, IEEE/ACM Transactions on Networking 6(2), 1998.
"""

from __future__ import annotations

from collections import Counter

from swarm.errors import ErrorCode, RemoteProtocolError


class Holdings:
    """Bytes that each client has in steps that wait, are computed or are answered; all in all
    at most `most`. A client may hold as much as is left over by all; hence one alone holds half,
    two hold a third each, and whoever comes next finds as much again."""

    def __init__(self, most: int) -> None:
        self.left = most
        self._held: Counter[str] = Counter()

    def take(self, client: str, count: int) -> None:
        """Raises RemoteProtocolError BUSY."""
        if self._held[client] + count > self.left - count:
            raise RemoteProtocolError(
                ErrorCode.BUSY,
                "too many bytes of yours wait here; send less at a time",
                retry_after=1.0,
            )
        self._held[client] += count
        self.left -= count

    def give(self, client: str, count: int) -> None:
        self.left += count
        self._held[client] -= count
        if not self._held[client]:
            del self._held[client]
