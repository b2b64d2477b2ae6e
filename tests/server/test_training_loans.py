"""Adapters from strangers: what is no adapter is refused, and what is one stays its owner's."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import save

from swarm.config import ServerLimits
from swarm.errors import ErrorCode
from swarm.messages import Bundle, Lend, Lent
from swarm.messages_training import BundleSpec
from swarm.models.adapters import BlockAdapter
from swarm.models.bundles import digest_of, from_bundle, id_of, to_bundle
from swarm.models.spans import SpanStep
from swarm.pieces import spec_of
from swarm.transport import Stream
from tests.inprocess import MODEL, Server
from tests.server.stranger import Stranger, assert_same, expected_of, hidden_of
from tests.server.test_training import GOOD, hear, refused, request, say
from tests.server.town import Town

HIDDEN = 48
PATH = "self_attn.q_proj"


def factors(rank: int = 2, seed: int = 0) -> BlockAdapter:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, HIDDEN, generator=generator)
    return BlockAdapter({PATH: (down, torch.randn(HIDDEN, rank, generator=generator))})


def bundle(**tensors: torch.Tensor) -> bytes:
    """Of the query projection, but for the changes."""
    good = {"lora_A": torch.ones(2, HIDDEN), "lora_B": torch.ones(HIDDEN, 2)}
    return save({f"{PATH}.{name}": tensor for name, tensor in (good | tensors).items()})


def specs(data: Mapping[int, bytes]) -> tuple[BundleSpec, ...]:
    return tuple(
        BundleSpec(block=block, digest=digest_of(part), size=len(part))
        for block, part in data.items()
    )


def lend(stranger: Stranger, server: Server, data: Mapping[int, bytes], **changes: Any) -> Lend:
    name = changes.get("session_id", secrets.token_bytes(16))
    fields: dict[str, Any] = {
        "model": MODEL.name,
        "fingerprint": MODEL.fingerprint,
        "dtype": "float32",
        "session_id": name,
        "start": server.record.record.blocks.start,
        "end": server.record.record.blocks.end,
        "bundles": specs(data),
        "credentials": stranger.credentials(server, name),
    }
    return Lend(**fields | changes)


async def lent(
    stranger: Stranger, server: Server, data: Mapping[int, bytes], **changes: Any
) -> tuple[Stream, tuple[int, ...]]:
    """A loan, and which blocks' bundles were sent for it."""
    stream = await stranger.dial(server)
    await say(stream, lend(stranger, server, data, **changes))
    message = await hear(stream)
    assert isinstance(message, Lent), message
    missing = message.missing
    for block in missing:
        for start in range(0, len(data[block]), 500):
            await say(
                stream, Bundle(block=block, start=start, data=data[block][start : start + 500])
            )
    if missing:
        message = await hear(stream)
        assert message == Lent(), message
    return stream, missing


BAD: dict[str, bytes] = {
    "noise": b"\xff" * 100,
    "a header of terabytes": b"\xff\xff\xff\xff\xff\xff\x00\x00{}",
    "nothing behind the header": bundle()[:-100],
    "a pickle": b"\x80\x04\x95\x10cos\nsystem\n",
    "nothing": save({}),
    "another layer": save({"self_attn.z_proj.lora_A": torch.ones(2, HIDDEN)}),
    "a path": save({"../../embed_tokens.lora_A": torch.ones(2, HIDDEN)}),
    "no layer": save({"": torch.ones(2, HIDDEN), "weight": torch.ones(1)}),
    "one of two factors": save({f"{PATH}.lora_A": torch.ones(2, HIDDEN)}),
    "weights": save({f"{PATH}.weight": torch.ones(HIDDEN, HIDDEN)}),
    "another width": bundle(lora_A=torch.ones(2, HIDDEN + 1)),
    "another height": bundle(lora_B=torch.ones(HIDDEN - 1, 2)),
    "two ranks": bundle(lora_B=torch.ones(HIDDEN, 3)),
    "rank nothing": bundle(lora_A=torch.ones(0, HIDDEN), lora_B=torch.ones(HIDDEN, 0)),
    "a huge rank": bundle(lora_A=torch.ones(513, HIDDEN), lora_B=torch.ones(HIDDEN, 513)),
    "too few dimensions": bundle(lora_A=torch.ones(2 * HIDDEN)),
    "integers": bundle(lora_A=torch.ones(2, HIDDEN).long(), lora_B=torch.ones(HIDDEN, 2).long()),
    "two dtypes": bundle(lora_A=torch.ones(2, HIDDEN).half()),
    "no numbers": bundle(lora_A=torch.full((2, HIDDEN), torch.nan)),
    "infinity": bundle(lora_B=torch.full((HIDDEN, 2), torch.inf)),
    "wide prompts": save({"prompts": torch.ones(2, HIDDEN + 1)}),
    "no prompts": save({"prompts": torch.ones(0, HIDDEN)}),
    "one prompt too flat": save({"prompts": torch.ones(HIDDEN)}),
    "whole prompts": save({"prompts": torch.ones(2, HIDDEN).long()}),
    "prompts of no numbers": save({"prompts": torch.full((2, HIDDEN), torch.nan)}),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_adapter_is_refused(town: Town, kind: str) -> None:
    async def go() -> None:
        stream = await town.stranger.dial(town.server)
        await say(stream, lend(town.stranger, town.server, {0: BAD[kind]}))
        assert await hear(stream) == Lent(missing=(0,))
        await say(stream, Bundle(block=0, start=0, data=BAD[kind]))
        assert await refused(stream) is ErrorCode.BAD_ADAPTER
        stream.cancel()

    town.run(go())


GOOD_BUNDLE = to_bundle(factors())


@pytest.mark.parametrize(
    "part",
    [
        Bundle(block=1, start=0, data=GOOD_BUNDLE),  # not missing
        Bundle(block=0, start=1, data=GOOD_BUNDLE),
        Bundle(block=0, start=0, data=GOOD_BUNDLE + b"x"),
        Bundle(block=0, start=0, data=bytes(len(GOOD_BUNDLE))),  # another hash
        Bundle(block=0, start=0, data=to_bundle(factors(seed=1))),  # likewise, and an adapter
    ],
)
def test_what_was_not_announced_is_refused(town: Town, part: Bundle) -> None:
    async def go() -> None:
        stranger = Stranger(town.swarm, client=93)
        stream = await stranger.dial(town.server)
        await say(stream, lend(stranger, town.server, {0: GOOD_BUNDLE}))
        assert await hear(stream) == Lent(missing=(0,))
        await say(stream, part)
        assert await refused(stream) is ErrorCode.BAD_ADAPTER
        stream.cancel()

    town.run(go())


def test_openings_of_loans_are_checked_as_all_others(town: Town) -> None:
    async def go() -> None:
        spec = BundleSpec(block=0, digest=bytes(32), size=1)
        huge = spec.model_copy(update={"size": 1 << 30})
        for changes, code in [
            ({"model": "another"}, ErrorCode.WRONG_MODEL),
            ({"session_id": b"another session!"}, ErrorCode.UNAUTHORIZED),
            ({"end": 3}, ErrorCode.BAD_SPAN),
            ({"start": 2, "end": 1}, ErrorCode.BAD_SPAN),
            ({"bundles": (spec, spec)}, ErrorCode.BAD_SPAN),
            ({"bundles": (huge,)}, ErrorCode.OVERSIZE),
        ]:
            stream = await town.stranger.dial(town.server)
            good = lend(town.stranger, town.server, {0: GOOD_BUNDLE})
            await say(stream, good.model_copy(update=changes))
            assert await refused(stream) is code
            stream.cancel()

    town.run(go())


def test_a_hash_is_worth_nothing_to_others(town: Town) -> None:
    """Who knows it has to bring the adapter all the same; who brought it does not again."""

    async def go() -> None:
        one, two = Stranger(town.swarm, client=92), Stranger(town.swarm, client=91)
        data = {0: to_bundle(factors(seed=3)), 1: to_bundle(factors(seed=4))}
        first, missing = await lent(one, town.server, data)
        assert missing == (0, 1)
        again, missing = await lent(one, town.server, data)
        assert missing == ()
        other, missing = await lent(two, town.server, data)
        assert missing == (0, 1)
        three = Stranger(town.swarm, client=89)
        stream = await three.dial(town.server)  # nor may it be named
        await say(stream, request(three, town.server, adapter=id_of(specs(data))))
        assert await refused(stream) is ErrorCode.UNKNOWN_ADAPTER
        for each in (first, again, other, stream):
            each.cancel()

    town.run(go())


def test_loans_that_were_never_made_cannot_be_used(town: Town) -> None:
    async def go() -> None:
        name = id_of(specs({0: GOOD_BUNDLE}))
        part, _ = await lent(town.stranger, town.server, {0: GOOD_BUNDLE}, end=1)
        opening = town.stranger.opening(town.server, adapter=name)
        asked = request(town.stranger, town.server, adapter=bytes(32), tensors=GOOD)
        for message in (asked, opening):  # block 1 was not lent
            stream = await town.stranger.dial(town.server)
            await say(stream, message)
            assert await refused(stream) is ErrorCode.UNKNOWN_ADAPTER
            stream.cancel()
        part.cancel()

    town.run(go())


def test_a_session_has_what_was_lent_for_it_and_nobody_else_has(town: Town) -> None:
    async def go() -> None:
        text = hidden_of(town.local, 5)
        adapter = factors(seed=5)
        data = {1: to_bundle(adapter)}
        stream, _ = await lent(town.stranger, town.server, data)
        talk = await town.stranger.open(town.server, adapter=id_of(specs(data)))
        plain = await town.stranger.open(town.server)
        cache = town.local.open_cache(town.local.blocks, 1, 64)
        cache.adapter = {1: adapter}
        expected = town.local.run([SpanStep(cache, text)])[0]
        got = await talk.ask(text)
        assert_same(got, expected)
        assert_same(await plain.ask(text), expected_of(town.local, text))
        stream.cancel()  # the session keeps what it was lent
        assert_same(await talk.ask(text[:, :1]), town.local.run([SpanStep(cache, text[:, :1])])[0])
        talk.stream.cancel()
        plain.stream.cancel()

    town.run(go())


def test_memory_for_adapters_is_bounded_and_comes_back() -> None:
    size = len(to_bundle(factors()))
    with Town(limits=ServerLimits(adapter_bytes=4 * size, send_timeout=2.0)) as town:

        async def go() -> None:
            stock = town.server.handler._loans.stock
            one, two = town.stranger, Stranger(town.swarm, client=90)
            held = [await lent(one, town.server, {0: to_bundle(factors(seed=s))}) for s in (0, 1)]
            stream = await one.dial(town.server)  # half of what no others hold is all
            await say(stream, lend(one, town.server, {0: to_bundle(factors(seed=2))}))
            assert await refused(stream) is ErrorCode.BUSY
            held.append(await lent(two, town.server, {0: to_bundle(factors(seed=3))}))
            assert stock.kept_bytes == 3 * size
            for each, _ in held:
                each.cancel()
            while len(stock):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            for seed in range(4, 9):  # what nobody holds makes room
                each, missing = await lent(one, town.server, {0: to_bundle(factors(seed=seed))})
                assert missing == (0,)
                assert stock.kept_bytes <= 4 * size
                each.cancel()
            each, missing = await lent(one, town.server, {0: to_bundle(factors(seed=8))})
            assert missing == ()
            each.cancel()

        town.run(go())


def test_bundles_are_what_they_were() -> None:
    adapter = factors(rank=3)
    again = from_bundle(to_bundle(adapter), {PATH: (HIDDEN, HIDDEN)}, torch.device("cpu"))
    assert to_bundle(again) == to_bundle(adapter)
    for one, two in zip(again.factors[PATH], adapter.factors[PATH], strict=True):
        assert torch.equal(one, two)
    assert spec_of(again.factors[PATH][0]).shape == (3, HIDDEN)
