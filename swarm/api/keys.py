"""Who may ask, and how much: keys, and the budget of each."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from swarm.errors import UsageError
from swarm.web import HttpProblem

_REMEMBERED = 10_000  # addresses of people without keys


class Grant(BaseModel):
    """What one key is good for, as its file says it; None: no limit of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: Annotated[str, Field(min_length=16, max_length=200, pattern=r"^[\x21-\x7e]+$")]
    streams: Annotated[int, Field(ge=1)] | None = None  # at a time, waiting ones included
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None  # of prompts and answers


class Budget:
    """Tokens that refill steadily up to one minute's worth. Debts are paid before anything new."""

    def __init__(self, per_minute: int | None, now: float) -> None:
        self._per_minute = per_minute
        self._left = float(per_minute or 0)
        self._at = now

    def take(self, tokens: int, now: float) -> None:
        if self._per_minute is not None:
            self._refill(now)
            self._left -= tokens

    def wait(self, now: float) -> float:
        """Seconds until something may be begun."""
        if self._per_minute is None:
            return 0.0
        self._refill(now)
        return 0.0 if self._left > 0 else (1 - self._left) * 60 / self._per_minute

    def _refill(self, now: float) -> None:
        assert self._per_minute is not None
        grown = self._left + (now - self._at) * self._per_minute / 60
        self._left, self._at = min(float(self._per_minute), grown), now


@dataclass(eq=False)
class Caller:
    """Somebody whose turns and tokens are counted; `streams` are open or waiting."""

    streams_allowed: int | None
    budget: Budget
    streams: int = 0

    def check(self, count: int, now: float) -> None:
        """Whether `count` more streams may begin. Raises HttpProblem."""
        allowed = self.streams_allowed
        if allowed is not None and self.streams + count > allowed:
            raise HttpProblem(
                429,
                f"this key may have {allowed} streams at a time, and has {self.streams}",
                kind="requests",
                code="rate_limit_exceeded",
                retry_after=1.0,
            )
        if wait := self.budget.wait(now):
            raise HttpProblem(
                429,
                "the tokens of this key for this minute are used up",
                kind="tokens",
                code="rate_limit_exceeded",
                retry_after=wait,
            )


@dataclass
class Keyring:
    """Keys are kept as digests. Without any, everybody may ask, and is known by address."""

    grants: Sequence[Grant] = ()
    _known: dict[bytes, Caller] = field(default_factory=dict[bytes, Caller])
    _strangers: OrderedDict[str, Caller] = field(default_factory=OrderedDict[str, Caller])

    def __post_init__(self) -> None:
        for grant in self.grants:
            caller = Caller(grant.streams, Budget(grant.tokens_per_minute, 0.0))
            self._known[_digest(grant.key)] = caller

    def caller(self, authorization: str, address: str) -> Caller:
        """Of an Authorization header. Raises HttpProblem."""
        if not self._known:
            return self._stranger(address)
        scheme, _, key = authorization.partition(" ")
        given, found = _digest(key.strip()), None
        for digest, caller in self._known.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(digest, given):
                found = caller
        if found is None or scheme.lower() != "bearer":
            raise HttpProblem(
                401,
                "this server wants an API key: send it as 'Authorization: Bearer KEY'"
                if not authorization
                else "this API key is not known here",
                code="invalid_api_key",
            )
        return found

    def _stranger(self, address: str) -> Caller:
        caller = self._strangers.setdefault(address, Caller(None, Budget(None, 0.0)))
        self._strangers.move_to_end(address)
        if len(self._strangers) > _REMEMBERED:
            self._strangers.popitem(last=False)
        return caller


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_grants(path: Path | None, keys: Sequence[str]) -> list[Grant]:
    """From a TOML file with a table for each key, and from the command line. Raises UsageError.

    Nothing of what is wrong is quoted: it may be a key.
    """
    tables: Mapping[str, object] = {}
    try:
        if path is not None:
            tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise UsageError(f"{path} is no TOML; see docs/api.md for an example") from None
    named = {**tables, **{f"--api-key {n}": {"key": key} for n, key in enumerate(keys, 1)}}
    grants: list[Grant] = []
    for name, table in named.items():
        try:
            grants.append(TypeAdapter(Grant).validate_python(table))
        except ValidationError as error:
            first = error.errors(include_input=False, include_context=False)[0]
            where = ".".join(map(str, (name, *first["loc"])))
            raise UsageError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    if len({grant.key for grant in grants}) < len(grants):
        raise UsageError("two entries have the same key: give each its own")
    if path is not None and not tables:
        raise UsageError(f"{path} holds no keys: without --keys nobody needs one")
    return grants
