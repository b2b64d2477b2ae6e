"""hivemind's butterfly all-reduce, in which everything that others send is what was agreed on.

Each member sums up a part of the vector for all, and answers with what changes in it. A part whose
member is lost stays as it was; who sends nothing in time, or nonsense, is left out of the rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from hivemind.averaging.allreduce import AllreduceException, AllReduceRunner, AveragingMode
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.partition import TensorPartReducer
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2 as generated
from torch import Tensor

from swarm.dht.meeting import Member

logger = logging.getLogger(__name__)

messages: Any = generated  # without types

MAX_VALUE = 1e9  # of a parameter: what is larger, or no number, is refused
_PART_BYTES = 1 << 17  # what is summed up at a time; a small vector has a few parts for each member
_LEAST_PART_BYTES = 1 << 10


class Runner(AllReduceRunner):
    """One member's part in one round. `service` is the class of the handlers, and their name."""

    def __init__(
        self,
        p2p: Any,
        service: tuple[Any, str],
        vector: Tensor,
        group: GroupInfo,
        members: Sequence[Member],
        silence: float,
    ) -> None:
        self._samples = dict(zip(group.peer_ids, (float(m.samples) for m in members), strict=True))
        modes = [AveragingMode.NODE if m.listens else AveragingMode.CLIENT for m in members]
        summing = sum(member.listens for member in members)
        quarter = len(vector) * 4 // summing // 4  # bytes, of what one of them sums up
        super().__init__(
            p2p=p2p,
            servicer_type=service[0],
            prefix=service[1],
            group_id=group.group_id,
            tensors=[vector],
            weight=self._samples[p2p.peer_id],
            ordered_peer_ids=group.peer_ids,
            peer_fractions=tuple(float(member.listens) for member in members),
            modes=modes,
            sender_timeout=silence,
            reducer_timeout=2 * silence,
            part_size_bytes=max(_LEAST_PART_BYTES, min(_PART_BYTES, quarter)),
        )
        shapes = tuple(part.shape for part in self.parts_for_local_averaging)
        self.tensor_part_reducer = _Reducer(shapes, len(self.sender_peer_ids))

    def expects(self, first: Any, peer: PeerID) -> bool:
        """Whether this begins what a member has for us, who has not begun yet."""
        mine = first.group_id == self.group_id
        return mine and peer in self.sender_peer_ids and peer not in self.active_senders

    @property
    def parts_done(self) -> int:
        """How many of the vector's parts have come back, or never will."""
        container: Any = self.tensor_part_container
        return sum(container._outputs_registered_by_peer)

    def give_up_the_rest(self) -> None:
        """What has not come back by now stays as it is."""
        for place in range(self.group_size):
            self.tensor_part_container.register_failed_reducer(place)

    def end(self) -> None:
        """What went wrong has been said: asyncio need not log it, too."""
        if self._future.done() and not self._future.cancelled():
            self._future.exception()

    async def rpc_aggregate_part(self, stream: Any, context: Any) -> AsyncIterator[Any]:
        sizes = [len(part) for part in self.parts_for_local_averaging]
        checked = _checked(stream, sizes, MAX_VALUE, self._samples[context.remote_id])
        async for message in super().rpc_aggregate_part(checked, context):
            yield message

    def _get_peer_stub(self, peer: PeerID) -> Any:
        place = self.ordered_peer_ids.index(peer)
        container: Any = self.tensor_part_container
        sizes = [len(part) for part, _ in container._input_parts_by_peer[place]]
        return _CheckedStub(super()._get_peer_stub(peer), sizes)


class _Reducer(TensorPartReducer):
    """hivemind's waits without end after it has lost somebody at the wrong moment, for two reasons.

    It counts a part as there while that only waits for its turn. And all who sum up one part wait
    for the same future, which whoever is cancelled there cancels for everybody.
    """

    async def accumulate_part(
        self, sender_index: int, part_index: int, tensor_part: Tensor, weight: float = 1.0
    ) -> Tensor:
        while part_index > self.current_part_index and not self.finished.is_set():
            await asyncio.wait({self.current_part_future})
        adding = super().accumulate_part(sender_index, part_index, tensor_part, weight)
        return await asyncio.shield(adding)


class _CheckedStub:
    """Somebody who sums up, and whose answers are looked at."""

    def __init__(self, stub: Any, sizes: Sequence[int]) -> None:
        self._stub, self._sizes = stub, sizes

    async def rpc_aggregate_part(self, parts: AsyncIterator[Any]) -> AsyncIterator[Any]:
        return _checked(await self._stub.rpc_aggregate_part(parts), self._sizes, 2 * MAX_VALUE)


async def _checked(
    stream: AsyncIterator[Any], sizes: Sequence[int], limit: float, weight: float | None = None
) -> AsyncIterator[Any]:
    """Messages whose numbers are as many as agreed and all finite, before anybody computes with
    them. Raises AllreduceException."""
    count = 0
    async for message in stream:
        part = message.tensor_part
        if weight is None and message.code != messages.AVERAGED_PART:
            yield message  # a refusal: hivemind knows what to do
            return
        if (
            count >= len(sizes)
            or tuple(part.size) != (sizes[count],)
            or len(part.buffer) != 4 * sizes[count]
            or (part.dtype, part.compression, part.requires_grad) != ("float32", 0, False)
            or (weight is not None and message.weight != weight)
            or not bool((np.abs(np.frombuffer(part.buffer, np.float32)) <= limit).all())
        ):
            logger.warning("refused what a member sent: not the numbers agreed on, or not finite")
            raise AllreduceException("not the numbers that were agreed on, or not finite")
        count += 1
        yield message
