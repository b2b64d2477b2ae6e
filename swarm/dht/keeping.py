"""What a DHT node keeps for others and believes of them, and how it finds who keeps a key.

With node.py the door to hivemind, whose own look-ups and stores search for the nodes that keep a
key each time, and have all of them send all that they keep of it. Here they are searched for every
few minutes, by a key beside it that nobody keeps anything of, and asked directly in between.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import TimedStorage

from swarm.dht.pages import MAX_ON_PAGE
from swarm.dht.records import MAX_LIFETIME
from swarm.dht.validation import Entry, check_entry
from swarm.errors import InvalidRecord
from swarm.identity import SwarmKey

logger = logging.getLogger(__name__)

REPLICAS = 5
_SPARE = 5  # more nodes that are known of each key
_SEARCH_SECONDS = 180.0  # between two searches for the nodes of a key
_SWEEP_SECONDS = 30.0
_KEYS_PER_CALL = 8  # pages in an answer: far below the 4 MiB that hivemind takes
MAX_RECORDS = 1 << 14  # that a node keeps of all, about 1.5 kB each...
MAX_OF_ONE = 32  # ...and of one peer: three pages and the registry, some of before it moved

Node = tuple[DHTID, PeerID]


class Storage(DHTLocalStorage):
    """Forgets what was not renewed for as long as a record may live, by our own clock: by those of
    others it could be an hour more. No key takes more than a page of records, and no peer's names,
    models and renewals, of which it may invent any number, take more than a little memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._swept = clock, clock()
        self._arrived: dict[tuple[DHTID, Any], float] = {}
        self._records: Counter[Any] = Counter()  # of each peer

    def store_subkey(self, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        page = self.get(key)
        known = page.value if page else {}
        held = known.get(subkey)
        if held is None and len(known) >= MAX_ON_PAGE:
            return False
        if held is not None and held.expiration_time >= expiration_time:
            return False  # hivemind would take a note of it
        new = (key, subkey) not in self._arrived
        if new and (self._records[subkey] >= MAX_OF_ONE or len(self._arrived) >= MAX_RECORDS):
            return False
        stored = super().store_subkey(key, subkey, value, expiration_time)
        if stored:
            self._arrived[key, subkey] = self._clock()
            self._records[subkey] += new
        return stored

    def get(self, key: DHTID) -> Any:
        if self._clock() - self._swept > _SWEEP_SECONDS:
            self._sweep()
        return super().get(key)

    def _sweep(self) -> None:
        self._swept = now = self._clock()
        for (key, subkey), arrived in list(self._arrived.items()):
            if now - arrived <= MAX_LIFETIME:
                continue
            del self._arrived[key, subkey]
            self._records[subkey] -= 1
            if (page := self.data.get(key)) and isinstance(page.value, DictionaryDHTValue):
                dictionary: Any = page.value  # hivemind's annotations forget what it is
                del dictionary[subkey]
                if not dictionary:
                    del self[key]
        self._records = +self._records
        for storage in (self, *(page.value for page in self.data.values())):
            if isinstance(storage, TimedStorage):
                _forget_ghosts(storage)


def _forget_ghosts(storage: Any) -> None:
    """hivemind keeps a note of each renewal until that would have expired, for hours."""
    if len(storage.expiration_heap) > 2 * len(storage.data):
        storage.expiration_heap = sorted(storage.key_to_heap.values())


class Validator(RecordValidatorBase):
    """hivemind's view of `check_entry`. On the network a value is the record's own bytes."""

    def __init__(self, key: SwarmKey | None, now: Callable[[], float]) -> None:
        self._key, self._now = key, now

    def validate(self, record: DHTRecord) -> bool:
        subkey = record.subkey[2:].decode(errors="replace")  # msgpack: type, length, text
        try:
            if MSGPackSerializer.dumps(subkey) != record.subkey:
                raise InvalidRecord("a value without the subkey of a peer")
            check_entry(
                Entry(record.key, subkey, record.value, record.expiration_time),
                swarm_key=self._key,
                now=self._now(),
                hashed=lambda name: DHTID.generate(name).to_bytes(),
            )
        except InvalidRecord as error:
            logger.info("refused %s", error)
            return False
        return True

    def drop_invalid(self, key: bytes, dictionary: Any) -> bool:
        """Remove from somebody's answer, or from what they want stored, all that is not valid."""
        dictionary.maxsize = math.inf  # theirs to say in hivemind's format, but ours to keep
        with dictionary.freeze():
            for count, (subkey, (value, kept_until)) in enumerate(list(dictionary.items())):
                record = DHTRecord(key, MSGPackSerializer.dumps(subkey), value, kept_until)
                if (
                    count >= MAX_ON_PAGE
                    or not isinstance(value, bytes)
                    or not self.validate(record)
                ):
                    del dictionary[subkey]
        return True

    def sign_value(self, record: DHTRecord) -> bytes:
        return cast(bytes, MSGPackSerializer.loads(record.value))

    def strip_value(self, record: DHTRecord) -> bytes:
        return MSGPackSerializer.dumps(record.value)


@lru_cache(4096)
def place_of(peer: PeerID) -> DHTID:
    """Where a node is among all."""
    return DHTID.generate(peer.to_base58())


def believe_places_of_peers_only(protocol: Any) -> None:
    """Have hivemind's protocol believe no node to be elsewhere than its peer id says: one that told
    of itself as all the nearest to a key hid whatever is kept there."""
    find, update = protocol.call_find, protocol.update_routing_table

    async def call_find(peer: PeerID, keys: Collection[DHTID]) -> Any:
        answer: Any = await find(peer, keys)
        for _, nearest in (answer or {}).values():
            for node in [node for node, its_peer in nearest.items() if node != place_of(its_peer)]:
                del nearest[node]
        return answer

    async def update_table(node: DHTID | None, peer: PeerID, responded: bool = True) -> None:
        if node is None or node == place_of(peer):
            await update(node, peer, responded)

    protocol.call_find, protocol.update_routing_table = call_find, update_table


@dataclass(slots=True)
class _Key:
    id: DHTID
    nodes: list[Node]  # the nearest that are known, ourselves included
    until: float


class Keepers:
    """Stores with, and asks, the nodes that keep a key: those whose ids are nearest to its hash."""

    def __init__(self, dht: DHTNode) -> None:
        self._dht: Any = dht  # whose types are incomplete
        self._known: dict[str, _Key] = {}

    async def store(
        self, names: Sequence[str], value: bytes, kept_until: float, subkey: str
    ) -> bool:
        """False if somebody did not take it, or nobody."""
        await self._find_nodes(names)
        entry = value, kept_until, subkey
        taken = await asyncio.gather(*(self._store_one(name, *entry) for name in names))
        return all(answers and all(answers) for answers in taken)

    async def get(
        self, names: Sequence[str], replicas: int | None = None
    ) -> dict[str, list[bytes]]:
        """What some of the nodes that keep each key have; None: all of them."""
        found: dict[str, dict[str, tuple[bytes, float]]] = {name: {} for name in names}
        asked: dict[str, set[DHTID]] = {name: set() for name in names}
        wanted = REPLICAS if replicas is None else replicas
        todo = list(names)
        while todo:
            await self._find_nodes(todo)  # anew, if nobody answered
            calls: dict[Node, list[str]] = {}
            for name in todo:
                untried = [node for node in self._nodes(name) if node[0] not in asked[name]]
                for node in random.sample(untried, min(wanted, len(untried))):
                    asked[name].add(node[0])
                    calls.setdefault(node, []).append(name)
            await asyncio.gather(*(self._ask(*call, found) for call in calls.items()))
            wanted = REPLICAS  # nobody answered, or had nothing, as who has just come
            todo = [name for name in todo if calls and not found[name]]
        return {name: [value for value, _ in values.values()] for name, values in found.items()}

    def _nodes(self, name: str) -> list[Node]:
        return self._known[name].nodes[:REPLICAS] if name in self._known else []

    async def _find_nodes(self, names: Iterable[str]) -> None:
        now = asyncio.get_running_loop().time()
        beside: dict[DHTID, str] = {}
        for name in names:
            known = self._known.get(name)
            if known is None or now > known.until or not known.nodes or self._is_outdated(known):
                beside[DHTID(int(DHTID.generate(name)) ^ 1)] = name
        if not beside:
            return
        found = await self._dht.find_nearest_nodes(
            list(beside), k_nearest=REPLICAS + _SPARE, exclude_self=self._dht.protocol.client_mode
        )
        for name in [name for name, known in self._known.items() if now > known.until]:
            del self._known[name]
        for query, name in beside.items():
            until = now + _SEARCH_SECONDS * random.uniform(0.75, 1.25)
            self._known[name] = _Key(DHTID.generate(name), list(found[query].items()), until)

    def _is_outdated(self, known: _Key) -> bool:
        """We have met somebody who is nearer since, which matters while a swarm is small."""
        nodes = known.nodes[:REPLICAS]
        farthest = max((known.id ^ node for node, _ in nodes), default=0)
        table = self._dht.protocol.routing_table
        near = table.get_nearest_neighbors(known.id, REPLICAS, exclude=self._dht.node_id)
        return any(
            (len(nodes) < REPLICAS or known.id ^ node < farthest) and (node, peer) not in nodes
            for node, peer in near
        )

    def _failed(self, name: str, node: Node) -> None:
        if (known := self._known.get(name)) and node in known.nodes:
            known.nodes.remove(node)
            known.until = 0.0

    async def _store_one(
        self, name: str, value: bytes, kept_until: float, subkey: str
    ) -> list[bool]:
        answers: list[bool] = []
        while nodes := self._nodes(name)[len(answers) :]:
            storing = (self._store_at(node, name, value, kept_until, subkey) for node in nodes)
            for node, taken in zip(nodes, await asyncio.gather(*storing), strict=True):
                if taken is None:
                    self._failed(name, node)
                else:
                    answers.append(taken)
        return answers

    async def _store_at(
        self, node: Node, name: str, value: bytes, kept_until: float, subkey: str
    ) -> bool | None:
        protocol, key = self._dht.protocol, DHTID.generate(name)
        if node[0] == self._dht.node_id:
            record = DHTRecord(key.to_bytes(), MSGPackSerializer.dumps(subkey), value, kept_until)
            valid: bool = protocol.record_validator.validate(record)
            return valid and protocol.storage.store_subkey(key, subkey, value, kept_until)
        answer = await protocol.call_store(node[1], [key], [value], kept_until, [subkey])
        return bool(answer[0]) if answer else None

    async def _ask(
        self, node: Node, names: Sequence[str], found: dict[str, dict[str, tuple[bytes, float]]]
    ) -> None:
        for some in (names[i : i + _KEYS_PER_CALL] for i in range(0, len(names), _KEYS_PER_CALL)):
            ids = {name: DHTID.generate(name) for name in some}
            if node[0] == self._dht.node_id:
                storage = self._dht.protocol.storage
                pages = {key: (storage.get(key), {}) for key in ids.values()}
            elif (pages := await self._dht.protocol.call_find(node[1], list(ids.values()))) is None:
                for name in some:
                    self._failed(name, node)
                continue
            for name, key in ids.items():
                page = pages[key][0] if key in pages else None
                if page is None or not isinstance(page.value, DictionaryDHTValue):
                    continue
                for subkey, (value, kept_until) in page.value.items():
                    if kept_until > found[name].get(subkey, (b"", -math.inf))[1]:
                        found[name][subkey] = value, kept_until
