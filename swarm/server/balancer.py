"""Looks now and then whether this server would be of more use elsewhere."""

from __future__ import annotations

from swarm.dht.directory import SwarmView
from swarm.dht.records import ServerState
from swarm.server.placement import Holder
from swarm.types import Numerics

_COMING = (ServerState.JOINING, ServerState.ONLINE)


def holders_in(view: SwarmView, numerics: Numerics) -> list[Holder]:
    """Who holds what, or will soon, of those that can share a route with us."""
    return [
        Holder(record.peer_id, record.blocks, record.throughput * len(record.blocks))
        for record in (server.record for server in view.servers)
        if record.state in _COMING
        and record.numerics == numerics
        and record.peer_id not in view.silent
    ]
