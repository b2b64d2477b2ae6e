"""What a server says about itself in the DHT: small, bounded, signed, and checkable on its own.

Bytes of a record: RSA modulus (256), signature (256), msgpack list of the fields; in a private
swarm all of that sealed with the swarm key. `docs/identity.md` tells what the signature is worth.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from swarm.coordinates import MAX_PACKED
from swarm.dht.pages import MAX_BITS, bucket_of, pages_of
from swarm.errors import AuthenticationError, InvalidRecord, RemoteProtocolError, UsageError
from swarm.identity import (
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    SwarmKey,
    peer_id_of,
    verify,
)
from swarm.messages import MAX_BLOCKS
from swarm.types import BlockRange, ModelId, Numerics
from swarm.wire import pack, unpack

MAX_RECORD_BYTES = 1024
CLOCK_SLACK = 7200.0  # seconds that two peers' clocks may differ: an hour wrong each
MAX_LIFETIME = 600  # seconds
RETENTION = CLOCK_SLACK + MAX_LIFETIME  # seconds after its announcement that the DHT keeps a record
MAX_NEXT_RTTS = 6  # servers of which a record says how far they are
MAX_ADAPTERS = 3  # of which a record tells...
MAX_ADAPTER_NAME = 11  # ...names of so many bytes
REGISTRY = "models"  # the DHT key where some servers of each model are listed

_SCHEMA = 1
_DOMAIN = b"swarm-server-record-1"
_HEADER = PUBLIC_KEY_BYTES + SIGNATURE_BYTES
_TAG_CHARACTERS = 8
_VERIFIED = 2048  # records that are kept, as each is met several times: by node and by reader


class ServerState(StrEnum):
    """JOINING and DRAINING servers take no new sessions; OFFLINE is a farewell."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"
    OFFLINE = "offline"


def _text(max_bytes: int) -> object:
    def check(text: str) -> str:
        if len(text.encode(errors="replace")) > max_bytes or not text.isprintable():
            raise ValueError(f"not printable, or more than {max_bytes} bytes")
        return text

    return AfterValidator(check)


Milliseconds = Annotated[int, Field(ge=0, le=65_535)]
Coordinate = Annotated[int, Field(ge=-MAX_PACKED, le=MAX_PACKED)]
Height = Annotated[int, Field(ge=0, le=MAX_PACKED)]
Tag = Annotated[str, Field(min_length=_TAG_CHARACTERS, max_length=_TAG_CHARACTERS), _text(8)]


class Adapter(NamedTuple):
    """One that a server has for all. Its whole hash is 32 bytes, which the server itself tells."""

    name: Annotated[str, Field(min_length=1), _text(MAX_ADAPTER_NAME)]
    id: Annotated[bytes, Field(min_length=8, max_length=8)]

    def __str__(self) -> str:
        return f"{self.name}@{self.id.hex()}"


class ServerRecord(BaseModel):
    """One server's announcement. `peer_id` is who signed it; the rest is that peer's claim."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    peer_id: str
    model: ModelId
    blocks: BlockRange
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]  # of the whole model
    host: Annotated[str, Field(min_length=1), _text(56)]
    port: Annotated[int, Field(ge=1, le=65_535)]
    certificate_digest: Annotated[bytes, Field(min_length=32, max_length=32)]
    numerics: Numerics = Numerics()
    state: ServerState = ServerState.ONLINE
    throughput: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0  # tokens/s, span
    batch_throughput: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0  # 16 rows
    next_rtts: Annotated[
        dict[Tag, Milliseconds], Field(max_length=MAX_NEXT_RTTS)
    ] = {}  # by peer_tag
    queue: Annotated[int, Field(ge=0, le=65_535)] = 0  # steps waiting
    free_tokens: Annotated[int, Field(ge=0, lt=1 << 32)] = 0  # KV cache slots
    adapters: Annotated[tuple[Adapter, ...], Field(max_length=MAX_ADAPTERS)] = ()
    version: Annotated[str, _text(12)] = ""
    public_name: Annotated[str, _text(30)] = ""
    announced_at: Annotated[int, Field(ge=0, lt=1 << 53)] = 0  # ms since 1970; the newest counts
    lifetime: Annotated[int, Field(ge=1, le=MAX_LIFETIME)] = 90  # seconds
    page_bits: Annotated[int, Field(ge=0, le=MAX_BITS)] = 0  # of the page it lies on (pages.py)
    coordinates: tuple[Coordinate, Coordinate, Coordinate, Height] | None = None  # 0.1 ms
    uplink: Annotated[int, Field(ge=0, lt=1 << 32)] = 0  # KiB/s that its line has left; 0: unknown

    @model_validator(mode="after")
    def _bounds_of_shared_types(self) -> ServerRecord:
        name, fingerprint = self.model.name, self.model.fingerprint
        if not 1 <= len(name.encode(errors="replace")) <= 72 or not name.isprintable():
            raise ValueError("the model's name is not printable, empty or over 72 bytes")
        if len(fingerprint) != 64 or bytes.fromhex(fingerprint).hex() != fingerprint:
            raise ValueError("the fingerprint is not 64 hex digits")
        if self.blocks.end > self.num_blocks:
            raise ValueError(f"blocks {self.blocks} of a model with {self.num_blocks}")
        return self

    @property
    def expires_at(self) -> float:
        """Seconds since 1970, by the announcer's clock."""
        return self.announced_at / 1000 + self.lifetime

    @property
    def kept_until(self) -> float:
        """When DHT nodes forget it: later than `expires_at`, as their clocks may be ahead."""
        return self.announced_at / 1000 + RETENTION

    def rtt_to(self, peer_id: str) -> float | None:
        """Milliseconds there and back that this server measured to a possible next hop."""
        return self.next_rtts.get(peer_tag(peer_id))


@dataclass(frozen=True, slots=True)
class SignedRecord:
    """A record with the bytes that prove it, as they are passed on to others."""

    record: ServerRecord
    data: bytes


def peer_tag(peer_id: str) -> str:
    """The short name of a peer in RTT tables: a hint that nobody's safety rests on."""
    return peer_id[-_TAG_CHARACTERS:]


def dht_key(model: ModelId, bucket: int, page: str, key: SwarmKey | None) -> str:
    """The DHT key of a page of the records of `model` whose first block is in this bucket."""
    named = hashlib.sha256(f"{model.name}|{model.fingerprint}".encode()).hexdigest()
    return hide(f"{named}/{bucket}/{page}" if page else f"{named}/{bucket}", key)


def keys_of(record: ServerRecord, key: SwarmKey | None) -> tuple[str, ...]:
    """The only DHT keys under which `record` may lie: its pages', and, last, the registry's."""
    bucket = bucket_of(record.blocks.start, record.num_blocks)
    pages = pages_of(record.peer_id, record.page_bits)
    return *(dht_key(record.model, bucket, page, key) for page in pages), hide(REGISTRY, key)


def hide(name: str, key: SwarmKey | None) -> str:
    """A DHT key's name; in a private swarm one that strangers cannot work out."""
    return key.hide(name) if key else name


def sign_record(record: ServerRecord, identity: Identity, key: SwarmKey | None) -> SignedRecord:
    """Raises UsageError if the record is not the identity's own or breaks a bound."""
    if record.peer_id != identity.peer_id:
        raise UsageError(f"{record.peer_id} is not the identity that signs")
    payload = pack(_to_list(record))
    data = identity.public_key + identity.sign(_DOMAIN + payload) + payload
    data = key.seal(data) if key else data
    assert len(data) <= MAX_RECORD_BYTES, "the fields' bounds see to it"
    return SignedRecord(record, data)


def open_record(
    data: bytes, *, key: SwarmKey | None, now: float, clock_slack: float = CLOCK_SLACK
) -> ServerRecord:
    """Verify a record that stands alone; `now` and `clock_slack` are in seconds.

    Raises InvalidRecord for what is forged, malformed, from the future or long expired. With clocks
    an hour wrong, expiry cannot be judged closer than `clock_slack`; the directory does better by
    watching which records advance.
    """
    try:
        record = _verify(data, key)
    except (AuthenticationError, RemoteProtocolError, UsageError) as error:
        raise InvalidRecord(str(error)) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise InvalidRecord(f"{first['loc']}: {first['msg']}"[:200]) from error
    except ValueError as error:
        raise InvalidRecord("not the fields of a server record") from error
    if record.announced_at / 1000 > now + clock_slack:
        raise InvalidRecord(f"a record of {record.peer_id} from the future")
    if record.expires_at < now - clock_slack:
        raise InvalidRecord(f"a record of {record.peer_id} that expired")
    return record


@lru_cache(_VERIFIED)
def _verify(data: bytes, key: SwarmKey | None) -> ServerRecord:
    if len(data) > MAX_RECORD_BYTES:
        raise InvalidRecord(f"a record of {len(data)} bytes; at most {MAX_RECORD_BYTES}")
    data = key.unseal(data) if key else data
    public_key, payload = data[:PUBLIC_KEY_BYTES], data[_HEADER:]
    verify(public_key, _DOMAIN + payload, data[PUBLIC_KEY_BYTES:_HEADER])
    return _from_list(peer_id_of(public_key), unpack(payload, MAX_RECORD_BYTES))


_PLAIN_FIELDS = tuple(
    name
    for name in ServerRecord.model_fields
    if name not in ("peer_id", "model", "blocks", "numerics")
)


def _to_list(record: ServerRecord) -> list[object]:
    model, blocks, numerics = record.model, record.blocks, record.numerics
    nested = [model.name, bytes.fromhex(model.fingerprint), blocks.start, blocks.end]
    nested += [numerics.dtype, numerics.quantization]
    return [_SCHEMA, *nested, *(getattr(record, name) for name in _PLAIN_FIELDS)]


def _from_list(peer_id: str, value: object) -> ServerRecord:
    if not isinstance(value, list) or value[:1] != [_SCHEMA]:
        raise InvalidRecord("a record of a schema that this version does not know")
    name, fingerprint, start, end, dtype, quantization, *plain = cast("list[Any]", value)[1:]
    fingerprint = fingerprint.hex() if isinstance(fingerprint, bytes) else ""
    fields: dict[str, object] = {
        "peer_id": peer_id,
        "model": {"name": name, "fingerprint": fingerprint},
        "blocks": {"start": start, "end": end},
        "numerics": {"dtype": dtype, "quantization": quantization},
    }
    return ServerRecord.model_validate(fields | dict(zip(_PLAIN_FIELDS, plain, strict=True)))
