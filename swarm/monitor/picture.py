"""What is told of a model: health, coverage, tokens per second, servers, and what is needed most.

Pure: it knows values, and makes plain ones for JSON, in which what is not known is left out.
"""

from __future__ import annotations

import math
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from statistics import median_low
from typing import Any

from swarm.dht.directory import SwarmView
from swarm.dht.records import ServerRecord, ServerState, SignedRecord
from swarm.monitor.pulse import Answer
from swarm.monitor.roster import Member, State
from swarm.server.balancer import others_in
from swarm.server.placement import believe, choose_span, swarm_throughput
from swarm.types import BlockRange, ModelId, Numerics

Json = dict[str, Any]

NAME_CHARACTERS = 60  # of what servers call themselves; of models' names, more
_MODEL_CHARACTERS = 100
_MARKS = 2  # that may stand on one letter
_MOST_COMPARED = 50_000  # blocks, over all spans of one size
_COMING = (State.ONLINE, State.JOINING)


@dataclass(frozen=True, slots=True)
class Joining:
    """How others join: the peers to name, and whether the swarm has a key."""

    peers: tuple[str, ...]
    private: bool = False

    def command(self, model: ModelId, count: int) -> str:
        """For a shell: it is copied as it stands, whatever the model is called."""
        name = harmless(model.name, _MODEL_CHARACTERS)
        options = ["--num-blocks", str(count)]
        options += ["--swarm-key", "secret.key"] if self.private else []
        options += ["--peers", *self.peers]
        words = [*options, "--", name] if name.startswith("-") else [name, *options]
        return shlex.join(["swarm-server", *words])


def harmless(text: str, characters: int = NAME_CHARACTERS) -> str:
    """What strangers wrote, fit to be shown: one line, nothing invisible, nothing that turns the
    direction of what follows, no towers of marks, and not long."""
    kept: list[str] = []
    marks = 0
    for character in text[: 4 * characters]:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if character.isprintable() and marks <= _MARKS:
            kept.append(character)
    line = " ".join("".join(kept).split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def model_key(model: ModelId) -> str:
    """A short name of it that nobody can make another model have."""
    return sha256(f"{model.name}|{model.fingerprint}".encode()).hexdigest()[:16]


def draw(
    model: ModelId,
    num_blocks: int,
    members: Sequence[Member],
    answers: dict[str, Answer],
    joining: Joining,
) -> Json:
    """The picture of a model. `members` in the order in which they are to be told."""
    online = [member.record for member in members if member.state is State.ONLINE]
    classes = sorted({record.numerics for record in online}, key=precision)
    parts = [_part(model, num_blocks, online, numerics) for numerics in classes]
    # Hops that compute differently are never chained: what counts is the best of them alone.
    best = max(parts, key=lambda part: (part["covered"], part["tokens"]), default=None)
    replicas: list[int] = best["replicas"] if best else [0] * num_blocks
    coming = [member.record for member in members if member.state in _COMING]
    main = _main_numerics(best, coming)
    return {
        "name": harmless(model.name, _MODEL_CHARACTERS),
        "fingerprint": model.fingerprint,
        "num_blocks": num_blocks,
        "health": health(replicas),
        "replicas": replicas,
        "missing": ranges(replicas, 0),
        "single": ranges(replicas, 1),
        "tokens": significant(sum(part["tokens"] for part in parts)),
        "precision": precision(main),
        "precisions": {
            part["precision"]: {"tokens": part["tokens"], "covered": part["covered"]}
            for part in parts
        },
        **_needs(model, num_blocks, coming, main, joining, ranges(replicas, 0)),
        "servers": {m.record.peer_id: row(m, answers.get(m.record.peer_id)) for m in members},
    }


def health(replicas: Sequence[int]) -> str:
    """healthy, degraded or broken, by how many servers each block has."""
    return ("broken", "degraded", "healthy")[min(2, *replicas, 2)]


def ranges(replicas: Sequence[int], count: int) -> list[str]:
    """Where there are just so many servers, as `8:16`."""
    found: list[str] = []
    start = None
    for block, here in enumerate([*replicas, -1]):
        if here == count and start is None:
            start = block
        elif here != count and start is not None:
            found.append(f"{start}:{block}")
            start = None
    return found


def precision(numerics: Numerics) -> str:
    return "/".join(
        [numerics.dtype, numerics.quantization][: 1 + (numerics.quantization != "none")]
    )


def significant(number: float, digits: int = 3) -> float:
    """So many digits are enough for people, and what changes less is not sent again."""
    if number <= 0 or not math.isfinite(number):
        return 0.0
    places = digits - 1 - math.floor(math.log10(number))
    rounded = round(number, places)
    return int(rounded) if places <= 0 else rounded


def row(member: Member, answer: Answer | None) -> Json:
    """One server. Its own word when asked is newer than what it announced."""
    record = member.record
    load = answer.load if answer and member.state is not State.LOST else None
    told: Json = {
        "name": harmless(record.public_name),
        "state": str(member.state),
        "blocks": [record.blocks.start, record.blocks.end],
        "tokens": significant(max(record.throughput, record.batch_throughput)),
        "alone": significant(record.throughput),
        "queue": load.queue if load else record.queue,
        "free": load.free_tokens if load else record.free_tokens,
        "rtt": _milliseconds(answer) if member.state is not State.LOST else None,
        "path": _path(answer),
        "version": harmless(record.version, 12),
        "precision": precision(record.numerics),
        "adapters": [harmless(str(adapter), 28) for adapter in record.adapters],
        "address": f"{record.host}:{record.port}",
        "up": int(answer.up) if answer and answer.up is not None else None,
        "seen": int(member.seen),
        "gone": int(member.gone) if member.gone else None,
    }
    return {key: value for key, value in told.items() if value not in (None, "", [])}


def _milliseconds(answer: Answer | None) -> float | None:
    rtt = answer.rtt if answer else None
    return None if rtt is None else significant(1e3 * rtt, 2)


def _path(answer: Answer | None) -> str:
    """How it is reached: nobody relays for anybody, so who answers does so directly."""
    reachable = answer.reachable if answer else None
    return {True: "direct", False: "unreachable", None: ""}[reachable]


def _part(
    model: ModelId, num_blocks: int, online: Sequence[ServerRecord], numerics: Numerics
) -> Json:
    """What the servers that compute alike can do together."""
    alike = [record for record in online if record.numerics == numerics]
    changes = [0] * (num_blocks + 1)
    for record in alike:
        changes[min(record.blocks.start, num_blocks)] += 1
        changes[min(record.blocks.end, num_blocks)] -= 1
    replicas = list(accumulate(changes[:num_blocks]))
    holders = believe(others_in(_view(model, num_blocks, alike), numerics, ""))
    return {
        "numerics": numerics,
        "precision": precision(numerics),
        "replicas": replicas,
        "covered": sum(count > 0 for count in replicas),
        "tokens": significant(swarm_throughput(num_blocks, holders)),
    }


def _main_numerics(best: Json | None, coming: Sequence[ServerRecord]) -> Numerics:
    if best:
        return best["numerics"]
    return coming[0].numerics if coming else Numerics()


def _needs(
    model: ModelId,
    num_blocks: int,
    coming: Sequence[ServerRecord],
    numerics: Numerics,
    joining: Joining,
    missing: Sequence[str],
) -> Json:
    """What a newcomer of each size would do most good with: placement's own choice."""
    holders = believe(others_in(_view(model, num_blocks, coming), numerics, ""))
    sizes = sorted({max(1, num_blocks // part) for part in (num_blocks, 8, 4, 2, 1)})
    # Anybody may announce a model of thousands of blocks, for which choosing would take seconds.
    sizes = [size for size in sizes if (num_blocks - size) * size <= _MOST_COMPARED]
    gaps = [len(BlockRange.parse(gap)) for gap in missing]
    usual = max(gaps or [median_low([len(h.blocks) for h in holders] or [num_blocks])])
    needs = [
        {
            "blocks": str(choose_span(num_blocks, holders, size)),
            "count": size,
            "command": joining.command(model, size),
        }
        for size in sizes
    ]
    need = min(
        range(len(sizes)), key=lambda i: (sizes[i] < max(gaps or [0]), abs(sizes[i] - usual))
    )
    return {"needs": needs, "need": need}


def _view(model: ModelId, num_blocks: int, records: Sequence[ServerRecord]) -> SwarmView:
    """As placement wants to see it. Who joins and who serves count alike there."""
    assert all(r.state in (ServerState.ONLINE, ServerState.JOINING) for r in records)
    return SwarmView(model, num_blocks, tuple(SignedRecord(record, b"") for record in records))
