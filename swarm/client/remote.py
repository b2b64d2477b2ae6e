"""The remote blocks as a module, their sessions, and what generate sees of both."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swarm.client.connection import Connection
from swarm.client.hop import Hop
from swarm.client.recoveries import Recovery
from swarm.client.session import RemoteSession
from swarm.client.training import pass_through
from swarm.client.training_prompts import SoftPrompts
from swarm.errors import UsageError
from swarm.loop import BackgroundLoop
from swarm.models.adapters_peft import ShellAdapters, bundles_of
from swarm.models.bundles import Bundles
from swarm.models.shell import ShellCache
from swarm.tensors import TORCH_DTYPES
from swarm.types import BlockRange

_active: contextvars.ContextVar[tuple[InferenceSession, ...]] = contextvars.ContextVar(
    "swarm_sessions", default=()
)
_watched: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar(
    "swarm_hidden_states", default=None
)
_kept: contextvars.ContextVar[int | None] = contextvars.ContextVar("swarm_kept", default=None)


class InferenceSession:
    """Attention caches on the servers, for ordinary threads. One thread at a time may use it.

    `with model.inference_session(max_length=512) as session:` makes it the one that `generate`
    uses inside the block. `max_length` is what servers reserve; growing beyond it costs a replay.
    """

    def __init__(
        self,
        connection: Connection,
        blocks: BlockRange,
        max_length: int,
        prefix: int = 0,
        bundles: Callable[[], Bundles | None] = lambda: None,
    ) -> None:
        if max_length < 1:
            raise UsageError(f"max_length is {max_length}; a session needs at least one position")
        self.blocks = blocks
        self.max_length = max_length
        self.prefix = prefix  # positions in front of every text, which are not counted
        self.output_ids: Tensor | None = None
        self.attention_mask: Tensor | None = None  # of output_ids; None: no padding
        # Since a generate broke off, or searched with beams, servers may hold other tokens there.
        self.doubtful_from: int | None = None
        self.reordered = False  # since the last `generate` began
        self._connection = connection
        self._bundles = bundles  # adapters, as they are when it begins
        self._remote: RemoteSession | None = None
        self._rows = 0
        self._tokens: list[contextvars.Token[tuple[InferenceSession, ...]]] = []
        self._closer: weakref.finalize[Any, Any] | None = None

    @property
    def position(self) -> int:
        """Positions that the servers hold. Setting it rolls back; the text is cut to it, too."""
        return 0 if self._remote is None else max(0, self._remote.position - self.prefix)

    @position.setter
    def position(self, position: int) -> None:
        self.rollback(position)
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, :position]

    @property
    def hops(self) -> Sequence[Hop]:
        """The route as it is now: `blocks`, `endpoint` and `peer_id` of every hop."""
        return [] if self._remote is None else list(self._remote.hops)

    @property
    def recoveries(self) -> int:
        """How often a hop was replaced."""
        return 0 if self._remote is None else self._remote.recoveries

    @property
    def log(self) -> Sequence[Recovery]:
        """The last recoveries: who was lost and why, and how long the text stood still."""
        return [] if self._remote is None else list(self._remote.log)

    @property
    def standbys(self) -> Sequence[Hop]:
        """Servers that stand by for those of the route (`ClientConfig.standby_after`)."""
        return [] if self._remote is None else self._remote.tending.standbys

    @property
    def moves(self) -> int:
        """How often a server was left that had not failed: it ended, or another one was better."""
        return 0 if self._remote is None else self._remote.tending.moves

    def rollback(self, position: int) -> None:
        """Forget what came after `position`, servers and client alike. Raises UsageError."""
        if not 0 <= position <= self.position:
            raise UsageError(
                f"cannot go to position {position}; this session is at {self.position}"
            )
        if self._remote is not None:
            self._remote.rollback(position + self.prefix if position else 0)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i continues what row `rows[i]` was (beam search)."""
        self.reordered = True
        if self._remote is not None:
            self._remote.reorder(rows)

    def step(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        padding: Tensor | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """New hidden states `[B, T, H]` through all blocks; the result has the same shape.

        `position_ids` is int64 `[B, T]` (or `[3 | 4, B, T]`), None counts on; `padding` is
        `[B, T]` with 1 for real tokens. With `keep` only so many positions come back, the last
        ones, which spares the link the others. Raises NoRoute, SessionClosed.
        """
        remote = self.remote(hidden_states.shape[0])
        inputs = _inputs(remote.position, hidden_states, position_ids, padding)
        output = self._connection.loop.call(remote.step(hidden_states, inputs, keep))
        return output.to(hidden_states.device, hidden_states.dtype)

    def is_of(self, blocks: RemoteBlocks) -> bool:
        """Whether it is for just these blocks of this model."""
        return self._connection is blocks.connection and self.blocks == blocks.blocks

    def remote(self, rows: int) -> RemoteSession:
        """What lives in the background loop; servers hear of it with its first step.

        Raises UsageError if it has other rows.
        """
        if self._remote is not None and rows != self._rows:
            raise UsageError(
                f"this session has {self._rows} rows, and these are {rows} (each beam and returned "
                "sequence is one): open another session for them"
            )
        if self._remote is None:
            self._rows = rows
            length = self.max_length + self.prefix
            bundles = self._bundles()
            self._remote = self._connection.open(self.blocks, rows, length, bundles)
            self._closer = weakref.finalize(self, _close, self._connection.loop, self._remote)
            self._closer.atexit = False  # at exit the streams end anyway
        return self._remote

    def close(self) -> None:
        """Free the servers' memory. Closing twice is fine."""
        if self._closer is not None:
            self._closer.detach()
            assert self._remote is not None
            self._connection.loop.call(self._remote.close())
            self._closer = None

    def __enter__(self) -> InferenceSession:
        self._tokens.append(_active.set((*_active.get(), self)))
        return self

    def __exit__(self, *_: object) -> None:
        _active.reset(self._tokens.pop())
        self.close()


def active_sessions() -> Sequence[InferenceSession]:
    """Those whose `with` block we are in, the innermost last."""
    return _active.get()


def _close(loop: BackgroundLoop, remote: RemoteSession) -> None:
    """A session that nobody refers to any more: free the servers, without waiting."""
    loop.spawn(remote.close)


def _inputs(
    position: int, hidden: Tensor, position_ids: Tensor | None, padding: Tensor | None
) -> Mapping[str, Tensor]:
    """What has to travel: nothing that servers would assume anyway. Each is `[B, T, ...]`."""
    batch, tokens = hidden.shape[:2]
    inputs: dict[str, Tensor] = {}
    if position_ids is not None:
        counted = torch.arange(position, position + tokens)
        if not torch.equal(position_ids.cpu(), counted.expand(position_ids.shape)):
            given = position_ids if position_ids.ndim == 2 else position_ids.permute(1, 2, 0)
            inputs["position_ids"] = given.expand(batch, *given.shape[1:]).cpu().long()
    if padding is not None and not bool(padding.bool().all()):
        inputs["padding"] = padding.expand(batch, tokens).cpu().bool()
    return inputs


class RemoteCache(ShellCache):
    """A session in the shape that transformers wants a cache to have."""

    def __init__(self, session: InferenceSession) -> None:
        self.session = session
        super().__init__()

    @property
    def length(self) -> int:
        return self.session.position

    @length.setter
    def length(self, value: int) -> None:
        if value != self.session.position:
            self.session.rollback(value)

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers calls it: minus the number of tokens to forget."""
        self.session.rollback(self.session.position - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.session.reorder(beam_idx.tolist())

    @property
    def max_cache_len(self) -> int:
        """Asked for by PEFT, before it makes keys and values. Raises UsageError."""
        raise UsageError(
            "keys and values are on the servers, so that prefix tuning has no place here: use "
            "tuning_mode='deep_ptune'"
        )

    def activate_past_recording(self) -> None:
        """Servers can always go back, or be replayed to."""


class RemoteBlocks(nn.Module):
    """Blocks `[start, end)` of a model, somewhere in the swarm.

    Calling it runs hidden states `[B, T, H]` through all of them, without a cache; slices are
    RemoteBlocks, too; `inference_session` keeps caches. Gradients pass through, not to a session.
    """

    def __init__(self, connection: Connection, blocks: BlockRange) -> None:
        super().__init__()
        self.connection = connection
        self.blocks = blocks
        self.prompts: SoftPrompts | None = None  # in front of all texts
        self.adapters: ShellAdapters | None = None  # within the blocks
        self.announced: Bundles | None = None  # an adapter that servers have, and we do not

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        """`blocks[3:9]` are blocks 3 to 8 of these, `blocks[3]` is one. Raises IndexError."""
        if isinstance(index, int):
            index = range(len(self))[index]
            index = slice(index, index + 1)
        start, end, stride = index.indices(len(self))
        if stride != 1 or start >= end:
            raise IndexError(f"{index} does not name consecutive blocks of {self.blocks}")
        first = self.blocks.start
        part = RemoteBlocks(self.connection, BlockRange(first + start, first + end))
        part.adapters, part.announced = self.adapters, self.announced
        return part.train(self.training)

    def inference_session(self, max_length: int = 2048) -> InferenceSession:
        """Reserves `max_length` positions per row on every server, at the first step."""
        prefix = 0 if self.prompts is None else len(self.prompts)
        return InferenceSession(self.connection, self.blocks, max_length, prefix, self.bundles)

    def bundles(self) -> Bundles | None:
        """The adapters as they are now, and deep prompts."""
        deep = self._deep() is not None
        if self.announced is not None and deep:
            raise UsageError("deep prompts do not go with active_adapter: load its weights instead")
        if self.adapters is None and not deep:
            return self.announced
        with torch.no_grad():
            live = {} if self.adapters is None else self.adapters.live()
            if self.prompts is not None:
                dtype = TORCH_DTYPES[self.connection.terms.numerics.dtype]
                live = self.prompts.within(live, self.blocks, dtype)
            return bundles_of(live) if live else None

    def forward(
        self,
        hidden: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """`attention_mask` is `[B, T]` (or `[B, past + T]`) with 1 for real tokens."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise UsageError("attention_mask must be [batch, length] with 1 for real tokens")
        if extras:
            raise UsageError(f"{', '.join(extras)} cannot travel through the swarm yet")
        tokens = hidden.shape[1]
        padding = None
        if attention_mask is not None:  # of the new tokens alone, of which there may be none
            padding = attention_mask[:, attention_mask.shape[1] - tokens :]
        session = past_key_values.session if isinstance(past_key_values, RemoteCache) else None
        if self.prompts is not None and (session is None or session.prefix):
            begun = session is not None and session.position > 0
            position_ids = self.prompts.positions(position_ids, begun=begun)
            if not begun:
                hidden, padding = self.prompts.before(hidden), self.prompts.padding(padding)
        if session is not None:
            output = self._step(session, hidden, position_ids, padding)
        elif (states := _watched.get()) is not None:
            for block in range(len(self)):
                states.append(hidden[:, hidden.shape[1] - tokens :])
                hidden = self[block]._pass(hidden, position_ids, padding, self._deep(block))
            output = hidden
        else:
            output = self._pass(hidden, position_ids, padding, self._deep())
        return _at_end(output, tokens)

    def _deep(self, block: int | None = None) -> Tensor | None:
        deep = None if self.prompts is None else self.prompts.deep
        return deep if deep is None or block is None else deep[block : block + 1]

    def _step(
        self,
        session: InferenceSession,
        hidden: Tensor,
        position_ids: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise UsageError(
                "gradients do not pass through a session: call the model without a cache, or "
                "under torch.no_grad()"
            )
        keep = _kept.get()
        return session.step(hidden, position_ids=position_ids, padding=padding, keep=keep)

    def _pass(
        self,
        hidden: Tensor,
        position_ids: Tensor | None,
        padding: Tensor | None,
        deep: Tensor | None,
    ) -> Tensor:
        """Through all blocks: to train, or over a session that is used once."""
        may_learn = hidden.requires_grad or self.training or self.adapters is not None
        if deep is not None or (torch.is_grad_enabled() and may_learn):
            if self.announced is not None:
                raise UsageError(
                    "gradients do not pass through an adapter that only servers have: load its "
                    "weights with model.load_adapter instead of active_adapter"
                )
            inputs = _inputs(0, hidden, position_ids, padding)
            client, adapters = self.connection.training, self.adapters
            return pass_through(client, self.blocks, hidden, inputs, deep, adapters)
        length = max(1, hidden.shape[1])
        session = InferenceSession(self.connection, self.blocks, length, 0, self.bundles)
        try:
            keep = _kept.get()
            return session.step(hidden, position_ids=position_ids, padding=padding, keep=keep)
        finally:
            session.close()


def _at_end(output: Tensor, tokens: int) -> Tensor:
    """`[B, tokens, H]`: the last of the positions that came back, or zeros before them."""
    missing = tokens - output.shape[1]
    return torch.nn.functional.pad(output, (0, 0, missing, 0)) if missing else output


@contextmanager
def kept_positions(count: int | None) -> Generator[None]:
    """Inside, what remote blocks give is right in the last `count` positions only (None: all)."""
    token = _kept.set(count)
    try:
        yield
    finally:
        _kept.reset(token)


@contextmanager
def watched_blocks() -> Generator[list[Tensor]]:
    """Inside, what enters each block in a forward without a cache is added to the list.

    Each block is then a route of its own, which takes as many round trips.
    """
    states: list[Tensor] = []
    token = _watched.set(states)
    try:
        yield states
    finally:
        _watched.reset(token)
