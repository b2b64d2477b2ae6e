"""Sixteen sessions of every kind at once while servers die: each says what it would say alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from swarm.config import ServerLimits
from swarm.errors import CannotRewind
from swarm.fakes import Fate
from swarm.messages import Message
from swarm.models.spans import SpanStep
from swarm.server.backend import Failures, Work
from swarm.server.scheduler import Slice
from swarm.types import BlockRange
from tests.client.pairs import GREEDY, prompt, shell_of
from tests.client.twins import THIRDS, WHOLE, House, Twin
from tests.inprocess import FakeRouter, Server, Trap
from tests.models.tiny import LAYERS, VOCAB

SPANS = (*THIRDS, *THIRDS, (0, 1), (1, 3), (3, 5), (5, LAYERS))
LIMITS = ServerLimits(send_timeout=5.0, pass_tokens=64)  # so that prompts are cut
MOST = 240  # positions, of the 256 that tiny models have
ACTORS = 11
TURNS = 3  # of each of them
TIE = 1e-5  # between the two best logits


class Actor(Twin):
    """A twin with a random program, which also chooses tokens greedily."""

    def __init__(self, house: House, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.blocks = dice.choice([WHOLE, WHOLE, WHOLE, BlockRange(1, LAYERS - 1)])
        remote = house.swarm.blocks(
            house.whole,
            self.blocks,
            client=90 + seed % 4,
            chunk_bytes=16 * 4 * house.whole.hidden_size,
        )
        super().__init__(house, remote, dice.choice([1, 1, 2, 3]), dice.choice([8, MOST]))
        self.random.manual_seed(seed)
        self.span = house.local()  # they are not thread-safe
        self.pieces: list[tuple[Tensor, Tensor]] = []
        self._begin_anew([])
        self.table = torch.randn(VOCAB, self.span.hidden_size, generator=self.random)
        self.tokens = torch.arange(self.batch)
        self.ties = 0

    def play(self) -> None:
        with self:
            self._feed(self.dice.choice([3, 20, 150]), padded=True)
            for _ in range(TURNS):
                turns = [self._decode] * 4 + [self._speculate, self._piece, self._back]
                turns += [self._beam] * (2 if self.batch > 1 else 0)
                full = self.session.position > MOST - 40
                self.dice.choice([self._back] if full else turns)()

    # Turns -------------------------------------------------------------------------------------

    def _decode(self) -> None:
        for _ in range(self.dice.randint(1, 5)):
            self._advance(self.table[self.tokens][:, None])

    def _speculate(self) -> None:
        """Several tokens at once, some of which are taken back."""
        self._feed(self.dice.randint(2, 6))
        self.rollback(self.session.position - self.dice.randint(0, 2))
        self._decode()

    def _piece(self) -> None:
        self._feed(self.dice.choice([0, 2, 9, 30]), padded=True)

    def _back(self) -> None:
        position = self.session.position
        self.rollback(self.dice.choice([0, position // 2, max(0, position - 3)]))
        self._feed(self.dice.randint(1, 9))

    def _beam(self) -> None:
        for _ in range(self.dice.randint(1, 4)):
            self.reorder(*self.dice.choices(range(self.batch), k=self.batch))
            self._decode()

    # What both do --------------------------------------------------------------------------------

    def _feed(self, tokens: int, *, padded: bool = False) -> None:
        hidden = torch.randn(self.batch, tokens, self.span.hidden_size, generator=self.random)
        padding = None
        if padded and self.batch > 1:
            pads = torch.tensor([[self.dice.randint(0, tokens // 2)] for _ in range(self.batch)])
            padding = (torch.arange(tokens) >= pads).long()
        self._advance(hidden, padding)

    def _advance(self, hidden: Tensor, padding: Tensor | None = None) -> None:
        expected = self._alone(hidden, padding)
        keep = self.dice.choice([None, 1, 2])  # `generate` wants the end only
        got = self.session.step(hidden, padding=padding, keep=keep)
        real = torch.ones(hidden.shape[:2]) if padding is None else padding
        self.pieces.append((hidden, real))
        if keep is not None:
            expected, real = expected[:, -keep:], real[:, -keep:]
        torch.testing.assert_close(got[real.bool()], expected[real.bool()], atol=1e-4, rtol=0)
        if hidden.shape[1]:
            self.tokens = self._choose(got[:, -1], expected[:, -1])

    def _choose(self, got: Tensor, expected: Tensor) -> Tensor:
        """The tokens that follow in the swarm; alone it would say the same, but for ties."""
        norm = torch.nn.functional.layer_norm
        ours, alone = (norm(out, out.shape[-1:]) @ self.table.T for out in (got, expected))
        tokens, best = ours.argmax(-1), alone.max(-1)
        missing = best.values - alone.gather(-1, tokens[:, None])[:, 0]
        assert missing.max() <= TIE
        self.ties += int((tokens != best.indices).sum())
        return tokens

    def _alone(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        return self.span.run([SpanStep(self.cache, hidden, padding=padding)])[0]

    def rollback(self, position: int) -> None:
        self.session.rollback(position)
        text, real = (torch.cat(parts, 1)[:, :position] for parts in zip(*self.pieces, strict=True))
        self.pieces = [(text, real)]
        try:
            self.cache.crop(position)
        except CannotRewind:  # beyond what a window keeps: servers are replayed, and so are we
            self._begin_anew(self.pieces)

    def reorder(self, *rows: int) -> None:
        super().reorder(*rows)
        self.pieces = [(hidden[list(rows)], real[list(rows)]) for hidden, real in self.pieces]

    def _begin_anew(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.cache = self.span.open_cache(self.blocks, self.batch, 1 << 12)
        for piece in pieces:
            self._alone(*piece)


# Those who write texts ---------------------------------------------------------------------------


class Writer:
    """`generate`, in its several ways, beside what transformers alone had written before."""

    def __init__(self, house: House, model: Any, rows: int = 1, **options: Any) -> None:
        local: Any = house.model
        self.model = model
        self.mask = (torch.arange(14) >= torch.arange(rows)[:, None] * 5).long()
        self.ids = prompt(rows, 14, seed=rows) * self.mask
        self.options = GREEDY | {"max_new_tokens": 20, "attention_mask": self.mask} | options
        self.expected = local.generate(self.ids, **self.options)

    def play(self) -> None:
        got = self.model.generate(self.ids, **self.options)
        assert got.tolist() == self.expected.tolist()


class Streamer(Writer):
    """Token by token, for asyncio."""

    def play(self) -> None:
        async def read() -> list[int]:
            return [token.id async for token in self.model.stream(self.ids, **self.options)]

        assert asyncio.run(read()) == self.expected[0, self.ids.shape[1] :].tolist()


def writers(house: House) -> list[Writer]:
    house.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    model = shell_of(house.model, house.swarm.blocks(house.whole, WHOLE, chunk_bytes=4096))
    return [
        Streamer(house, model),
        Writer(house, model),
        Writer(house, model, rows=3),
        Writer(house, model, num_beams=3),
        Writer(house, model, prompt_lookup_num_tokens=3),
    ]


# What happens to servers -------------------------------------------------------------------------


class ForgivingRouter(FakeRouter):
    """Who finds nobody looks again, and sees who has come back."""

    def __init__(self, house: House) -> None:
        super().__init__(servers=house.swarm.router.servers)
        self.dead: set[str] = set()

    async def refresh(self) -> None:
        self.banned &= self.dead


class Storm:
    """One disaster after the other, each amid a frame; in between everybody comes back."""

    def __init__(self, house: House, seed: int) -> None:
        self.swarm, self.network = house.swarm, house.swarm.network
        self.servers = {server.peer_id: server for server in house.servers}
        self.router = house.swarm.router = ForgivingRouter(house)
        self.dice = random.Random(seed)
        self.blocked: list[tuple[str, str]] = []
        self.disasters = 0

    def rage(self, running: Sequence[Future[None]]) -> None:
        """Until all is over."""

        def over() -> bool:
            return all(future.done() for future in running)

        frames = self.network.frames
        while not over():
            calm = frames.total() + self.dice.randint(300, 700)
            self.swarm.wait_until(lambda calm=calm: over() or frames.total() > calm, 60)
            self.swarm.on_loop(self._heal)
            trap = self._lay_trap()
            self.swarm.wait_until(lambda trap=trap: over() or trap.sprung, 60)
            self.swarm.no_trap()
            self.disasters += trap.sprung
        self.swarm.on_loop(self._heal)

    def _lay_trap(self) -> Trap:
        """Amid one of the next frames one of its ends dies, or both, or the link between them."""
        skipped, ends = 0, list[str]()
        skip, kind = self.dice.randrange(20), self.dice.randrange(3)

        def fits(source: str, destination: str, method: str, message: Message) -> bool:
            nonlocal skipped, ends
            ends = [peer_id for peer_id in (source, destination) if peer_id in self.servers]
            skipped += kind == 0 or len(ends) == 2
            return skipped > skip

        async def act() -> Fate:
            if kind == 2:
                self.blocked.append((ends[0], ends[1]))
                self.network.block(*ends)
            for victim in ([self.dice.choice(ends)], ends, [])[kind]:
                self.router.dead.add(victim)
                self.network.cut(self.servers[victim].endpoint)
            return Fate.BREAK

        return self.swarm.trap(fits, act)

    def _heal(self) -> None:
        for victim in self.router.dead:
            self.swarm._revive(self.servers[victim])
        for pair in self.blocked:
            self.network.unblock(*pair)
        self.router.dead.clear()
        self.blocked.clear()


# All together ------------------------------------------------------------------------------------


class Witness:
    """Notes what shares the passes of a server."""

    def __init__(self, server: Server) -> None:
        self.most = 0  # sessions in one pass
        self.mixed = 0  # passes that held a token here and a piece of a prompt there
        self._run = server.executor.backend.run
        server.executor.backend.run = self.run  # type: ignore[method-assign]

    def run(self, slices: Sequence[Slice], works: Mapping[int, Work]) -> Failures:
        widths = {piece.end - piece.begin for piece in slices}
        self.most = max(self.most, len(slices))
        self.mixed += 1 in widths and max(widths) > 1
        return self._run(slices, works)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "bloom"])
def test_everything_at_once(family: str, caplog: pytest.LogCaptureFixture) -> None:
    with House(family, SPANS, limits=LIMITS) as house:
        storm = Storm(house, seed=1)
        witnesses = [Witness(server) for server in house.servers]
        actors = [Actor(house, seed) for seed in range(ACTORS)]
        players = [*actors, *writers(house)]
        assert len(players) == 16
        with ThreadPoolExecutor(len(players)) as threads:
            running = [threads.submit(player.play) for player in players]
            storm.rage(running)
        for future in running:
            future.result()
        assert storm.disasters >= 3
        assert sum(actor.session.recoveries for actor in actors) >= 10
        assert max(witness.most for witness in witnesses) >= 4
        assert sum(witness.mixed for witness in witnesses) >= 10
        assert sum(actor.ties for actor in actors) <= 1
    assert "[gap]" not in caplog.text  # clients knew where servers stood
