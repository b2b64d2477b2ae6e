"""Log lines that strangers cause: one of a kind each minute, or they would fill disks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_SECONDS = 60.0


class Sparing:
    """Warnings of few kinds. A line tells how many like it were held back since the last one."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}

    def warning(self, text: str, *args: object, code: str) -> None:
        """As of a logger; lines of one `text` and `code` are of a kind."""
        kind, now = (text, code), self._clock()
        last, held_back = self._kinds.get(kind, (now - _SECONDS, 0))
        if now - last < _SECONDS:
            self._kinds[kind] = last, held_back + 1
            return
        self._kinds[kind] = now, 0
        more = f" (and {held_back} like it since the last such line)" if held_back else ""
        self._logger.warning(text + more, *args, extra={"code": code})
