"""How large the next pass should be, learnt from what passes took: prefill shares, micro-batches.

Pure: times are arguments, in seconds of any one clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

SHARE = 2.0  # bulk work may lengthen a pass by so many usual decode passes...
REST = 1.0  # ...and then rests for so many times as long as that pass took
ACTIVE = 1.0  # seconds, at most, for which a stream counts as active after its last step
_HOLD = 0.5  # usual passes for which one may wait for more rows
_PROBE = 16  # bulk tokens that a pass takes while nothing is known of their cost
_MEMORY = 0.9  # weight of what was known when a pass is measured
_WINDOW = 0.1  # seconds, at least, over which throughput is measured...
_ROUNDS = 4  # ...and steps of every session
_GAIN = 1.1  # what another cut must bring to be kept: less is noise, and small passes cost more
_SETTLE = 1  # windows until a new cut shows in the throughput
_TRIAL = 2  # windows over which it is then judged
_REST = 8  # windows between two trials, doubled after every one that failed...
_MAX_REST = 128  # ...up to this


class Pass(NamedTuple):
    """What one pass held and when it ran: rows that decode by session, and bulk tokens."""

    decode: Mapping[int, int]
    bulk: int
    begin: float
    end: float


class Pace:
    """Bounds for the next pass: of bulk work by its time, of decode rows by `cut`."""

    def __init__(self) -> None:
        self.cut = Cut()
        self._usual: float | None = None  # seconds of a pass that only decodes
        self._bulk: float | None = None  # seconds that a bulk token adds
        self.rested = 0.0  # when bulk work may go on, if decode streams are active

    @property
    def usual(self) -> float:
        """Seconds of a pass that only decodes (0: not known yet)."""
        return self._usual or 0.0

    @property
    def hold(self) -> float:
        """Seconds for which a pass may wait for more rows."""
        return _HOLD * self.usual

    @property
    def bulk_tokens(self) -> int:
        """Tokens of bulk work that a pass may take while decode streams are active."""
        if self._usual is None:
            return 1  # so little that the pass shows what one without it takes
        if self._bulk is None:
            return _PROBE
        return max(1, int(SHARE * self._usual / self._bulk))

    def measured(self, done: Pass) -> None:
        self.cut.measured(done)
        seconds = max(done.end - done.begin, 1e-9)
        if done.bulk:
            # By the clock, not by work done: who shares a machine with others that are busy rests
            # longer, or all of them together would leave no processor to the streams.
            self.rested = done.end + REST * seconds
        if done.decode and done.bulk <= 1:
            self._usual = _blend(self._usual, seconds)
        elif done.bulk:
            extra = seconds - (self._usual or 0.0)
            # A share of the whole at least: passes that happen to be quick are no free lunch.
            self._bulk = _blend(self._bulk, max(extra, 0.2 * seconds) / done.bulk)


def _blend(known: float | None, new: float) -> float:
    if known is None:
        return new
    return _MEMORY * known + (1 - _MEMORY) * min(new, 3 * known)  # the odd hiccup means little


class Cut:
    """Into how many batches the decode streams are cut, by what that does to throughput.

    Streams that meet in one pass go on together for good. If all have met, they march from server
    to server in lock-step and all servers but one are idle; if few have, all servers are busy with
    passes that hold little. So the most and the fewest rows of a pass are set to a whole part of
    all streams: more parts are tried while the device idles, fewer while it does not, and what
    does not pay is taken back. One server's cut shapes the batches of all servers behind it.
    """

    def __init__(self) -> None:
        self.parts = 0  # 0: every pass takes what is ready
        self._rows = 0  # of all streams that were active in the last window
        self._window: dict[int, int] = {}  # rows by session
        self._passes = self._steps = 0
        self._busy = 0.0
        self._since: float | None = None
        self._rate: float | None = None  # steps per second with the present cut
        self._trials = 0
        self._before = 0  # parts to go back to if a trial fails
        self._trial: list[float] | None = None
        self._rest = self._wait = _REST

    @property
    def most(self) -> int:
        """Rows that may decode in one pass."""
        return math.ceil(self._rows / self.parts) if self.parts else 1 << 30

    @property
    def fewest(self) -> int:
        """Rows for which a pass may be held back a little."""
        return self._rows // self.parts if self.parts else 0

    def measured(self, done: Pass) -> None:
        if self._since is None:
            self._since = done.begin
        self._window.update(done.decode)
        self._steps += len(done.decode)
        self._passes += 1
        self._busy += done.end - done.begin
        seconds = done.end - self._since
        if seconds < _WINDOW or self._steps < _ROUNDS * len(self._window):
            return
        rows = sum(self._window.values())
        if len(self._window) < 2 or not 0.7 < rows / max(1, self._rows) < 1.4:
            self.parts, self._trial, self._rate = 0, None, None  # other streams: begin anew
            self._rest = self._wait = _REST
        else:
            natural = round(self._passes * len(self._window) / self._steps)
            self._judge(self._steps / seconds, natural, idle=1 - self._busy / seconds)
        self._rows = rows
        self._window, self._steps, self._passes = {}, 0, 0
        self._busy, self._since = 0.0, done.end

    def _judge(self, rate: float, natural: int, idle: float) -> None:
        if self._trial is not None:
            self._trial.append(rate)
            if len(self._trial) == _SETTLE + _TRIAL:
                self._decide(sum(self._trial[_SETTLE:]) / _TRIAL)
            return
        self._rate = rate if self._rate is None else (self._rate + rate) / 2
        self._wait -= 1
        if self._wait > 0:
            return
        self._trials += 1
        parts = self.parts or natural
        wanted = parts + 1 if idle > 1 / (parts + 2) else parts - max(1, parts // 3)
        if self.parts and self._trials % 2:
            wanted = 0  # is it worth the trouble?
        elif not 0 < wanted <= len(self._window):
            return
        self._before, self._trial, self.parts = self.parts, [], wanted

    def _decide(self, rate: float) -> None:
        assert self._rate is not None
        if rate >= (_GAIN if self.parts else 1 / _GAIN) * self._rate:
            self._rate, self._rest = rate, _REST
        else:
            self.parts = self._before
            self._rest = min(2 * self._rest, _MAX_REST)
        self._wait, self._trial = self._rest, None
