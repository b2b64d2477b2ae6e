"""How long a text stands still when a server dies, leaves or freezes, and what failures cost.

Issue 4's table, on real processes: the bundled model in three spans with two servers each.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from subprocess import TimeoutExpired
from typing import Any

import torch
from transformers import StoppingCriteria

from benchmarks import churn, faults
from benchmarks.figures import NoFigure, at_most
from benchmarks.hop import Seen, Tap, tapped
from benchmarks.lab import PROMPT_TOKENS, Lab, Stopwatch, connect, generate
from swarm import LocalSwarm
from swarm.messages import Opened, Output, Step
from swarm.wire import decode

SPANS = ("0:8", "8:16", "16:24")
MIDDLE = 1  # of them
AT = 512  # tokens, after which something happens
AFTER = 16  # tokens that come when all is well again
PATIENCE = 400  # tokens in which a server that was told to go is still used, at most
RECENT = 64  # steps before it
EXIT_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Pause:
    """What a text went through; milliseconds."""

    longest: float  # between two tokens, from the signal on
    recent: float  # the longest step of those before
    replayed: int  # positions that were sent to a server again
    until_gone: float  # from the signal until the process has ended
    noticed: float  # from the signal until the client asks somebody something
    opened: float  # from there until the last server has opened a session
    answered: float  # from there until the first step behind all is answered

    @property
    def of_bound(self) -> float:
        """Of three such steps and a second."""
        return self.longest / (3 * self.recent + 1e3)


def measure(lab: Lab) -> None:
    lab.clear()
    lab.local("demo")
    at = AT // 8 if lab.quick else AT
    lab.progress("starting six servers")
    with LocalSwarm(spans=SPANS * 2) as swarm:
        _killed(lab, swarm, at)
        _stood_by(lab, swarm, at)
        _stopped(lab, swarm, at)
        _frozen(lab, swarm, at)
        faults.measure(lab, swarm)
        churn.measure(lab, swarm)
    lab.clear()


def _killed(lab: Lab, swarm: LocalSwarm, at: int) -> None:
    pauses = _pauses(lab, swarm, signal.SIGKILL, at)
    longest = [pause.longest for pause in pauses]
    lab.note(f"pause, SIGKILL at token {at}", "ms", longest, at_most(300))
    lab.note("the worst of them", "ms", [max(longest)], at_most(1000))
    lab.note("of it until it is noticed", "ms", [pause.noticed for pause in pauses])
    lab.note("… opening anew", "ms", [pause.opened for pause in pauses])
    lab.note("… replaying", "ms", [pause.answered for pause in pauses])


def _stood_by(lab: Lab, swarm: LocalSwarm, at: int) -> None:
    pauses = _pauses(lab, swarm, signal.SIGKILL, at, standby_after=at // 2)
    longest = [pause.longest for pause in pauses]
    lab.note(f"pause, SIGKILL at token {at}, with standbys", "ms", longest, at_most(60))
    lab.note("of it until it is noticed", "ms", [pause.noticed for pause in pauses])
    lab.note("longest step of the 64 before", "ms", [pause.recent for pause in pauses])


def _stopped(lab: Lab, swarm: LocalSwarm, at: int) -> None:
    pauses = _pauses(lab, swarm, signal.SIGTERM, at)
    longest = [pause.longest for pause in pauses]
    lab.note(f"pause, SIGTERM at token {at}", "ms", longest, at_most(60))
    replayed = [float(pause.replayed) for pause in pauses]
    lab.note("positions replayed for it", "", replayed, at_most(0))
    lab.note("that server has ended after", "s", [pause.until_gone / 1e3 for pause in pauses])
    lab.note("longest step of the 64 before", "ms", [pause.recent for pause in pauses])


def _frozen(lab: Lab, swarm: LocalSwarm, at: int) -> None:
    pauses = _pauses(lab, swarm, signal.SIGSTOP, at)
    lab.note(f"pause, SIGSTOP at token {at}", "ms", [pause.longest for pause in pauses])
    lab.note("longest step of the 64 before", "ms", [pause.recent for pause in pauses])
    bound = [pause.of_bound for pause in pauses]
    lab.note("pause / (3 x that step + 1 s)", "x", bound, at_most(1))


def _pauses(
    lab: Lab, swarm: LocalSwarm, sign: signal.Signals, at: int, standby_after: int | None = None
) -> list[Pause]:
    found: list[Pause] = []
    for run in range(lab.runs):
        found.append(_pause(lab, swarm, sign, at, standby_after))
        lab.say(f"pause, {sign.name} at token {at}, ms", run, found[-1].longest)
    return found


def _pause(
    lab: Lab, swarm: LocalSwarm, sign: signal.Signals, at: int, standby_after: int | None
) -> Pause:
    """The server in the middle gets the signal right after a token; another one takes its place."""
    distributed = connect(None, swarm, standby_after=standby_after)  # looks at the swarm anew
    most = at + PATIENCE
    victims: list[int] = []
    with tapped(distributed) as tap, distributed.inference_session(PROMPT_TOKENS + most) as session:

        def send() -> None:
            peer_id = session.hops[MIDDLE].peer_id
            victims.extend(one.index for one in swarm.servers if one.peer_id == peer_id)
            os.kill(swarm.servers[victims[0]].pid, sign)  # does not wait until it is dead

        def is_left() -> bool:
            names = {hop.peer_id for hop in session.hops}
            return bool(victims) and swarm.servers[victims[0]].peer_id not in names

        watch = Stopwatch(at, send)
        until = _Until(is_left)
        try:
            prompt = lab.prompts("demo", 1)
            sequences = generate(distributed, prompt, most, watch, stopping_criteria=[until])
            if not is_left():
                raise NoFigure(f"{PATIENCE} tokens after {sign.name} that server is still in use")
            gone = _until_gone(swarm, victims[0], watch.times[at - 1], sign)
        finally:
            for victim in victims:
                swarm.kill(victim)  # whatever it was sent before
    lab.check("demo", sequences, PROMPT_TOKENS)
    swarm.add(SPANS[MIDDLE])
    return _taken_apart(tap, watch, at, gone)


def _until_gone(swarm: LocalSwarm, victim: int, since: float, sign: signal.Signals) -> float:
    """Milliseconds; of one that is frozen none have to be waited for."""
    if sign != signal.SIGSTOP:
        with suppress(TimeoutExpired):
            swarm.servers[victim].child.process.wait(EXIT_SECONDS)
    return 1e3 * (time.perf_counter() - since)


def _taken_apart(tap: Tap, watch: Stopwatch, at: int, gone: float) -> Pause:
    since = watch.times[at - 1]
    noticed, opened, answered = milestones(tap, since)
    return Pause(
        longest=max(watch.gaps[at - 1 :]),
        recent=max(watch.gaps[max(0, at - 1 - RECENT) : at - 1]),
        replayed=replayed(tap.sent, since),
        until_gone=gone,
        noticed=1e3 * (noticed - since),
        opened=1e3 * (opened - noticed),
        answered=1e3 * (answered - opened),
    )


def milestones(tap: Tap, since: float) -> tuple[float, float, float]:
    """When the client first sent anything but a step, when the last server had opened a session,
    and when after that the first new position came out of the last hop: seconds, as `since`.

    What did not happen has the time of what was before.
    """
    asked = (seen.at for seen in tap.sent if seen.at > since and not _is(seen, Step))
    noticed = next(asked, since)
    openings = (seen.at for seen in tap.received if seen.at > noticed and _is(seen, Opened))
    opened = max(openings, default=noticed)
    newest = max((step.start for at, step in _steps(tap.sent) if at <= since), default=0)
    for seen in tap.received:
        output = decode(seen.frame) if seen.at > opened else None
        if isinstance(output, Output) and not output.pushed and output.start > newest:
            return noticed, opened, seen.at
    return noticed, opened, opened


def replayed(sent: Iterable[Seen], since: float) -> int:
    """Positions of steps after `since` which a step before had left behind."""
    newest = found = 0
    for at, step in _steps(sent):
        if at > since:
            end = step.start + step.hidden.shape[1]
            found += max(0, min(end, newest) - step.start)
        newest = max(newest, step.start)
    return found


def _steps(sent: Iterable[Seen]) -> Iterable[tuple[float, Step]]:
    for seen in sent:
        message = decode(seen.frame)
        if isinstance(message, Step):
            yield seen.at, message


def _is(seen: Seen, kind: type[Any]) -> bool:
    return isinstance(decode(seen.frame), kind)


class _Until(StoppingCriteria):
    """Some tokens after something has come true."""

    def __init__(self, happened: Callable[[], bool]) -> None:
        self._happened, self._left = happened, AFTER

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        self._left -= self._happened()
        return torch.full((len(input_ids),), self._left < 0, dtype=torch.bool)
