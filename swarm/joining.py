"""Which swarm is meant: its peers and its key, as somebody gave them or from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swarm.errors import UsageError

if TYPE_CHECKING:
    from swarm.identity import SwarmKey


def initial_peers_of(given: Sequence[str] | None) -> tuple[str, ...]:
    """As given, else from SWARM_PEERS; in each text (or one), blanks or commas are between them."""
    given = given or os.environ.get("SWARM_PEERS", "")
    texts = [given] if isinstance(given, str) else given
    return tuple(peer for text in texts for peer in re.split(r"[\s,]+", text) if peer)


def swarm_key_of(given: SwarmKey | str | None) -> SwarmKey | None:
    """As given (a key, its text or its file), else from SWARM_KEY. Raises UsageError."""
    from swarm.identity import SwarmKey  # commands must not wait for cryptography

    given = os.environ.get("SWARM_KEY") or None if given is None else given
    if given is None or isinstance(given, SwarmKey):
        return given
    if not given:  # as when a shell's variable is not set: nobody means a public swarm by it
        raise UsageError("the swarm key is empty: give the key or its file, or leave it out")
    return SwarmKey.parse(given) if given.startswith("swarm-key-") else SwarmKey.load(given)
