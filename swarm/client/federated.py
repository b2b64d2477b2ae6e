"""Several people, one adapter: they train on data of their own, and average what they train.

What leaves a client: the numbers of the trained parameters (float32), how many samples stand behind
them, and its signed introduction. Texts, losses and gradients do not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from swarm.dht.addresses import joinable_at, own_host
from swarm.dht.allreduce import MAX_VALUE
from swarm.dht.averaging import MAX_SAMPLES, Averaged, Averager, Rounds
from swarm.dht.meeting import MAX_GATHER, Meeting, Member, layout_of
from swarm.dht.node import DhtNode
from swarm.errors import PeerUnavailable, UsageError
from swarm.identity import Identity
from swarm.joining import initial_peers_of, swarm_key_of
from swarm.loop import BackgroundLoop

if TYPE_CHECKING:
    from swarm.identity import SwarmKey

__all__ = ["FederatedAverager", "Member", "Round", "Rounds"]

logger = logging.getLogger(__name__)

_ROUNDS = Rounds()
MAX_NUMBERS = 1 << 28  # a gigabyte: adapters and prompts are far smaller


@dataclass(frozen=True, slots=True)
class Round:
    """What came of a round. Without members nothing was averaged, for the `reason`."""

    members: tuple[Member, ...] = ()  # with us, and their samples
    lost: tuple[str, ...] = ()  # peer ids of those who left before they had sent us all
    share: float = 0.0  # of the numbers, that were averaged: the others' members were lost
    change: float = 0.0  # how far it moved our parameters (L2 norm), after clipping
    clipped: bool = False
    seconds: float = 0.0
    reason: str = ""

    @property
    def samples(self) -> int:
        """Behind the average."""
        return sum(member.samples for member in self.members)

    def __bool__(self) -> bool:
        return bool(self.members)

    def __str__(self) -> str:
        if not self:
            return f"not averaged after {self.seconds:.1f} s: {self.reason}"
        others = len(self.members) - 1
        return (
            f"averaged {self.share:.0%} with {others} other{'s' * (others != 1)} "
            f"({self.samples} samples) in {self.seconds:.1f} s"
        )


class FederatedAverager:
    """This client's place among those who average under the same `run_id`.

    `trained` is a module, of which all that has `requires_grad` is averaged, or names with
    parameters: the same names, shapes and dtypes everywhere. `initial_peers` and `swarm_key` say
    which swarm they meet in (None: SWARM_PEERS, SWARM_KEY); whoever is first may give none, and the
    others its `addresses`. Others dial us on `listen`, "HOST:PORT"; with None nobody can, and then
    somebody else must be there who can be dialled. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        trained: nn.Module | Iterable[tuple[str, nn.Parameter]],
        initial_peers: Sequence[str] | None = None,
        *,
        run_id: str,
        swarm_key: SwarmKey | str | None = None,
        listen: str | None = "0.0.0.0:0",  # people elsewhere take part
        rounds: Rounds = _ROUNDS,
        max_change: float | None = None,
    ) -> None:
        """`max_change` bounds how far one round may move our parameters (L2 norm).

        Raises UsageError, also if nobody is reachable.
        """
        self._parameters = _trained(trained)
        self._max_change = max_change
        peers, key = initial_peers_of(initial_peers), swarm_key_of(swarm_key)
        host, port = _parse_listen(listen)
        if not 0.1 <= rounds.gather <= MAX_GATHER or min(rounds.silence, rounds.exchange) <= 0:
            raise UsageError(f"rounds: gather must be 0.1 to {MAX_GATHER:.0f} s, the others over 0")
        if rounds.size is not None and rounds.size < 2:
            raise UsageError("rounds: size must be 2 or more, or None")
        layout = layout_of((name, p.shape, p.dtype) for name, p in self._parameters)
        identity = Identity.ephemeral()

        async def join() -> tuple[Averager, list[str]]:
            node = await DhtNode.create(
                identity, peers, host=host, port=port, key=key, client_mode=listen is None
            )
            meeting = Meeting(run_id, layout, identity, node, rounds.gather)
            averager = Averager(node, meeting, rounds, listens=listen is not None)
            try:
                visible = await node.visible_addresses() if listen is not None else []
                await averager.open()
            except BaseException:
                await averager.close()
                raise
            return averager, joinable_at(own_host(host, peers), visible)

        self._loop = BackgroundLoop.shared()
        self._averager, self.addresses = self._loop.call(join())
        self.peer_id = identity.peer_id

    def average(self, samples: int) -> Round:
        """Meet the others, and take over the mean of all parameters, weighted by `samples`.

        Parameters change all together, at the end, or not at all: what nobody averaged with us
        stays ours. Returns within the times of `rounds`. Not for use while something else changes
        the parameters. Raises UsageError if ours are not finite, or `samples` out of bounds.
        """
        if not 1 <= samples <= MAX_SAMPLES:
            raise UsageError(f"{samples} samples: there must be 1 or more to weigh in with")
        ours = self._vector()
        if not bool((ours.abs() <= MAX_VALUE).all()):
            raise UsageError("our parameters are not finite numbers: nothing was sent")
        began = time.monotonic()
        try:
            averaged = self._loop.call(self._averager.average(ours, samples))
            reason = "nobody else came"
        except PeerUnavailable as error:
            averaged, reason = None, str(error)
        done = Round(reason=reason) if averaged is None else self._apply(ours, averaged)
        done = replace(done, seconds=time.monotonic() - began)
        logger.info("%s", done)
        return done

    def close(self) -> None:
        """Let others have what they wait for, and leave. Idempotent."""
        if self._loop.alive:
            self._loop.call(self._averager.close())

    def __enter__(self) -> FederatedAverager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _vector(self) -> Tensor:
        flat = [p.detach().to("cpu", torch.float32).reshape(-1) for _, p in self._parameters]
        return torch.cat(flat)

    def _apply(self, ours: Tensor, averaged: Averaged) -> Round:
        move = averaged.vector - ours
        change = float(torch.linalg.vector_norm(move, dtype=torch.float64))
        if not change < float("inf"):
            return Round(reason="the average is not of finite numbers")
        clipped = self._max_change is not None and change > self._max_change
        if clipped:
            assert self._max_change is not None
            move *= self._max_change / change
            change = self._max_change
        target = ours + move
        pieces = target.split([p.numel() for _, p in self._parameters])
        new = [
            piece.view(p.shape).to(p.device, p.dtype)
            for piece, (_, p) in zip(pieces, self._parameters, strict=True)
        ]
        with torch.no_grad():
            for piece, (_, parameter) in zip(new, self._parameters, strict=True):
                parameter.copy_(piece)
        share = 1 - averaged.missing / len(ours)
        return Round(averaged.members, averaged.lost, share, change, clipped)


def _trained(
    trained: nn.Module | Iterable[tuple[str, nn.Parameter]],
) -> list[tuple[str, nn.Parameter]]:
    """In the order of their names, which is the same for everybody. Raises UsageError."""
    if isinstance(trained, nn.Module):
        trained = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
    found = sorted(trained, key=lambda named: named[0])
    numbers = sum(parameter.numel() for _, parameter in found)
    if not 1 <= numbers <= MAX_NUMBERS:
        raise UsageError(
            f"{numbers} numbers to average, of 1 to {MAX_NUMBERS}: give a model whose trained "
            "parameters have requires_grad, such as one with an adapter or with prompts"
        )
    if not all(parameter.is_floating_point() for _, parameter in found):
        raise UsageError("only floating point parameters can be averaged")
    return found


def _parse_listen(listen: str | None) -> tuple[str, int]:
    """Host and port. Raises UsageError."""
    host, _, port = (listen or "127.0.0.1:0").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise UsageError(f"listen='{listen}' is not HOST:PORT, such as 0.0.0.0:31400")
    return host.strip("[]"), int(port)
