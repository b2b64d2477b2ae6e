"""One stream and a long prompt over slower links: a shaping relay stands before every server.

Servers listen on 127.0.0.1 and announce 127.0.0.2, where the relay takes connections on the same
ports; so do both the client's and the other servers' connections pass it (Linux only).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.child import Child
from benchmarks.figures import at_most
from benchmarks.lab import PROMPT_TOKENS, Lab, Stopwatch, connect, generate
from benchmarks.models import THIRDS
from benchmarks.prefill import LENGTH
from swarm import LocalSwarm
from swarm.types import Codec

# Megabits per second, milliseconds there and back.
LINKS = {
    "1 Gbit/s, 4 ms": (1000, 4),
    "100 Mbit/s, 4 ms": (100, 4),
    "100 Mbit/s, 100 ms": (100, 100),
}
NARROW = "100 Mbit/s, 4 ms"
LONGEST = ("A", "100 Mbit/s, 100 ms")
JOURNEYS = 4  # of a token: to the first server, twice from one to the next, and back
BEHIND = "127.0.0.2"


def measure(lab: Lab) -> None:
    lab.clear()
    for name in ("A", "B"):
        with behind_relay(lab.path(name), THIRDS) as (swarm, relay):
            for link, (megabits, round_trip) in LINKS.items():
                relay.ask(f"{megabits} {round_trip / 2}")
                _over(lab, name, swarm, link)
                if link == NARROW:
                    _over(lab, name, swarm, link, "mxint8")
        lab.clear()


@contextmanager
def behind_relay(model: Path | None, spans: Sequence[str]) -> Generator[tuple[LocalSwarm, Child]]:
    """A swarm, and the relay before it, which is told its bandwidth and delay."""
    with LocalSwarm(model, spans=spans, server_args=["--announce-host", BEHIND]) as swarm:
        ports = [server.address.rpartition(":")[2] for server in swarm.servers]
        links = [f"{BEHIND}:{port}=127.0.0.1:{port}" for port in ports]
        with Child("benchmarks.relay", links) as relay:
            relay.read()
            yield swarm, relay


def _over(lab: Lab, name: str, swarm: LocalSwarm, link: str, codec: Codec = "none") -> None:
    remote = connect(lab.path(name), swarm, codec)
    generate(remote, lab.prompts(name, 1), 4)
    steps: list[float] = []
    firsts: list[float] = []
    for run in range(lab.runs):
        for length, tokens in ((PROMPT_TOKENS, lab.tokens // 2), (LENGTH, 1)):
            watch = Stopwatch()
            sequences = generate(remote, lab.prompts(name, 1, length), tokens, watch)
            if codec == "none":  # the other one is not exact: the suite `codec` says by how much
                lab.check(name, sequences, length)
            if tokens > 1:
                steps.append(median(watch.gaps))
            else:
                firsts.append(watch.first)
        lab.say(f"{name}, {link}, {codec}, token in ms", run, steps[-1])
    how = f"{name}, {link}" if codec == "none" else f"{name}, {link}, {codec}"
    lab.note(f"{how}, token", "ms", steps)
    if (name, link) == LONGEST:
        delay = JOURNEYS * LINKS[link][1] / 2
        lost = [100 * (1 - delay / step) for step in steps]
        lab.note(f"{how}, lost to anything but delay", "%", lost, at_most(10))
    lab.note(f"{how}, first token after {LENGTH}", "s", firsts)
