"""Adapters that servers announce, by their names: to use one, nobody needs its weights."""

from __future__ import annotations

import re

from swarm.client.network import ModelRouter, SwarmNetwork
from swarm.dht.records import Adapter, ServerState, SignedRecord
from swarm.errors import SwarmError, UsageError
from swarm.models.bundles import Bundles

_WHOLE = "[0-9a-f]{64}"


def find_adapter(network: SwarmNetwork, router: ModelRouter, wanted: str | None) -> Bundles | None:
    """`NAME`, or `NAME@HEX` with as much of the hash as tells it apart; all of it is believed,
    whatever the name, less is asked for at a server. Raises UsageError."""
    if wanted is None:
        return None
    name, _, begin = wanted.partition("@")
    whole = bytes.fromhex(begin) if re.fullmatch(_WHOLE, begin) else None
    held: dict[Adapter, list[SignedRecord]] = {}
    for server in router.view.servers:
        if server.record.state is ServerState.ONLINE:
            for adapter in server.record.adapters:
                held.setdefault(adapter, []).append(server)
    if whole is not None and any(whole.startswith(adapter.id) for adapter in held):
        return _announced(whole)
    found = [a for a in held if a.name == name and a.id.hex().startswith(begin[:16])]
    if not found:
        known = ", ".join(sorted(map(str, held))) or "none at all"
        raise UsageError(
            f"no server announces an adapter '{wanted}' (they announce {known}): choose one of "
            "these, or load its weights with model.load_adapter"
        )
    if len(found) > 1:
        raise UsageError(
            f"several adapters are called '{name}': say which one, {' or '.join(map(str, found))}"
        )
    (adapter,) = found
    for server in held[adapter]:
        try:
            told = network.ask(server).adapters.values()
        except SwarmError:
            continue
        for each in told:
            if each.startswith(adapter.id) and each.hex().startswith(begin):
                return _announced(each)
    raise UsageError(f"no server that announces {adapter} answers as if it had it: try again later")


def _announced(name: bytes) -> Bundles:
    return Bundles(name, {}, ())
