"""Who may fill how much of the key-value cache: a hard budget, counted in slots."""

from __future__ import annotations

from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError


class KvBudget:
    """Slots are batch rows x positions; a session reserves all it may ever need when it opens."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._held: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return self.slots - sum(self._held.values())

    def reserve(self, session_id: bytes, slots: int) -> None:
        """Raises RemoteProtocolError: TOO_LONG if it can never fit, BUSY if not now."""
        if session_id in self._held:
            raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "this session is open already")
        if slots > self.slots:
            raise RemoteProtocolError(
                ErrorCode.TOO_LONG, f"{slots} cache slots asked for; this server has {self.slots}"
            )
        if slots > self.free:
            raise RemoteProtocolError(
                ErrorCode.BUSY, f"{self.free} of {self.slots} cache slots free", retry_after=1.0
            )
        self._held[session_id] = slots

    def release(self, session_id: bytes) -> None:
        if self._held.pop(session_id, None) is None:
            raise LocalProtocolError("released a reservation that nobody holds")

    def check_integrity(self) -> None:
        """Raises LocalProtocolError if more is held than exists."""
        if self.free < 0 or any(slots < 0 for slots in self._held.values()):
            raise LocalProtocolError(f"cache accounting is off: {self.free} slots free")
