"""Hidden states that travel compressed: what both ends compute with, whatever dies."""

import pytest
import torch

from swarm.compression import decode_mxint8, encode_mxint8
from swarm.messages import Message, Output, Step
from swarm.models.spans import SpanStep
from swarm.types import BlockRange
from tests.client.twins import THIRDS, WHOLE, House


def compressed(hidden: torch.Tensor) -> torch.Tensor:
    return decode_mxint8(encode_mxint8(hidden), hidden.shape, hidden.dtype)


@pytest.mark.parametrize("killed", [None, 0, 1, 2])
def test_every_border_is_rounded_once_also_when_it_is_replayed(killed: int | None) -> None:
    with House() as house:
        blocks = house.swarm.blocks(house.whole, WHOLE, codec="mxint8")
        spans = [(house.whole, BlockRange(*ends)) for ends in THIRDS]
        caches = [span.open_cache(part, 1, 64) for span, part in spans]
        random = torch.Generator().manual_seed(5)
        with blocks.inference_session(64) as session:
            for index, tokens in enumerate((7, 1, 1, 3, 1)):
                hidden = torch.randn(1, tokens, house.whole.hidden_size, generator=random)
                expected = hidden
                for (span, _), cache in zip(spans, caches, strict=True):
                    expected = span.run([SpanStep(cache, compressed(expected))])[0]
                if index == 2 and killed is not None:
                    house.swarm.cut(house.swarm.serving(session, THIRDS[killed][0]))
                got = session.step(hidden)
                torch.testing.assert_close(got, compressed(expected), atol=0.05, rtol=0)
            assert session.recoveries == (killed is not None)


def test_nothing_travels_uncompressed() -> None:
    seen: list[str] = []

    def note(_source: str, _destination: str, _method: str, message: Message) -> bool:
        if isinstance(message, Step | Output) and message.hidden.data:
            seen.append(message.hidden.codec)
        return False

    async def never() -> None:
        raise AssertionError

    with House() as house:
        house.swarm.trap(note, never)
        blocks = house.swarm.blocks(house.whole, WHOLE, codec="mxint8")
        with blocks.inference_session(64) as session:
            session.step(torch.randn(1, 3, house.whole.hidden_size))
        # To the first hop, two pushes with copies of both, and the answer.
        assert seen == ["mxint8"] * 6
