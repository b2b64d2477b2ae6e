"""Adapters that a server's owner preloads for everybody: checked like strangers', never evicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from swarm.dht.records import MAX_ADAPTER_NAME, MAX_ADAPTERS, Adapter
from swarm.errors import RemoteProtocolError, UsageError
from swarm.models.adapters_peft import find_adapter, read_adapter
from swarm.models.bundles import Resident, from_bundle
from swarm.models.spans import Span
from swarm.server.choice import ServerConfig

MAX_RESIDENTS = 16  # so many a server can tell of (`info`)


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where they are, by name; `budget` is in bytes, of what lies in blocks that are held here."""

    folders: dict[str, Path]
    budget: int

    @classmethod
    def find(cls, config: ServerConfig) -> Shelf:
        """Raises UsageError."""
        if len(config.adapters) > MAX_RESIDENTS:
            raise UsageError(
                f"{len(config.adapters)} adapters are more than the {MAX_RESIDENTS} that a server "
                "can tell others of: preload fewer"
            )
        folders: dict[str, Path] = {}
        for source in config.adapters:
            given, _, rest = source.rpartition("=")
            name, folder = find_adapter(rest, config.token)
            if len(given.encode()) > MAX_ADAPTER_NAME:
                raise UsageError(
                    f"'{given}' is too long for an adapter: {MAX_ADAPTER_NAME} bytes at most"
                )
            name = given or name.encode()[:MAX_ADAPTER_NAME].decode(errors="ignore")
            if name in folders or not name.isprintable():
                raise UsageError(
                    f"two adapters cannot both be '{name}': say --adapters NAME={rest}"
                )
            folders[name] = folder
        return cls(folders, config.limits.resident_bytes)

    def load(self, config: PreTrainedConfig, span: Span) -> tuple[Resident, ...]:
        """Takes seconds. Raises UsageError."""
        residents: list[Resident] = []
        for name, folder in self.folders.items():
            bundles = read_adapter(config, folder, span.dtype)
            here = range(span.blocks.start, span.blocks.end)
            own = {spec.block: spec for spec in bundles.specs if spec.block in here}
            try:
                adapter = {
                    block: from_bundle(bundles.data[block], span.patches.sizes(block), span.device)
                    for block in own
                }
            except RemoteProtocolError as error:
                raise UsageError(f"the adapter in {folder} cannot be used: {error}") from error
            digests = {block: spec.digest for block, spec in own.items()}
            size = sum(spec.size for spec in own.values())
            residents.append(Resident(name, bundles.id, digests, adapter, size))
        taken = sum(resident.size for resident in residents)
        if taken > self.budget:
            raise UsageError(
                f"these adapters take {taken:,} bytes in blocks {span.blocks}, and there are "
                f"{self.budget:,} for them: preload fewer"
            )
        return tuple(residents)


def announced(residents: Sequence[Resident]) -> tuple[Adapter, ...]:
    """What a record says of them."""
    return tuple(Adapter(resident.name, resident.id[:8]) for resident in residents[:MAX_ADAPTERS])
