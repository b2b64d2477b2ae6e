"""Only the positions that are wanted come back from the last hop, whatever dies meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm.fakes import Fate, Hook
from swarm.messages import Message, Output, Step
from swarm.wire import decode
from tests.client.pairs import GREEDY, Pair, prompt, shell_of
from tests.client.twins import WHOLE, House

BORDERS = (0, 2, 4)


class Counted:
    """How many positions each hop answered, answer by answer."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.positions: dict[int, list[int]] = {start: [] for start in BORDERS}

    async def __call__(self, source: str, destination: str, method: str, frame: bytes) -> Fate:
        message = decode(frame)
        if isinstance(message, Output):
            server = next(s for s in self.house.servers if s.peer_id == source)
            start = server.record.record.blocks.start
            self.positions[start].append(message.hidden.shape[1])
        return Fate.DELIVER


def counted(house: House, act: Callable[[], Any]) -> dict[int, list[int]]:
    house.swarm.network.before_frame = counter = Counted(house)
    act()
    house.swarm.no_trap()
    return counter.positions


def test_a_prompt_s_answer_is_its_last_position_and_copies_stay_whole(house: House) -> None:
    with house.twin(chunk_bytes=4 * 4 * house.whole.hidden_size) as twin:
        said = counted(house, lambda: twin.step(10, keep=1))
        assert said == {0: [4, 4, 2], 2: [4, 4, 2], 4: [0, 0, 1]}
        said = counted(house, lambda: twin.step(10, keep=5))
        assert said[4] == [0, 3, 2]
        said = counted(house, lambda: twin.step(4, keep=99))
        assert said[4] == [4]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
    ],
    ids=["greedy", "beams", "sampling", "chunks"],
)
def test_generate_asks_for_no_more_than_it_needs(house: House, options: dict[str, Any]) -> None:
    local: Any = house.model
    model = shell_of(local, house.swarm.blocks(house.whole, WHOLE))
    settings = GREEDY | {"max_new_tokens": 3, "eos_token_id": None} | options

    def act() -> None:
        torch.manual_seed(0)
        expected = local.generate(prompt(), **settings)
        torch.manual_seed(0)
        assert model.generate(prompt(), **settings).tolist() == expected.tolist()

    assert set(counted(house, act)[4]) == {1}


@torch.no_grad()
def test_forwards_say_what_they_need(house: House) -> None:
    model = shell_of(house.model, house.swarm.blocks(house.whole, WHOLE))
    ids = prompt(rows=2)
    local: Any = house.model
    whole = local(ids).logits
    some: list[Any] = []
    said = counted(house, lambda: some.append(model(ids, logits_to_keep=2).logits))
    assert said[4] == [2]
    torch.testing.assert_close(some[0], whole[:, -2:], atol=1e-4, rtol=0)
    said = counted(house, lambda: some.append(model(ids).logits))
    assert said[4] == [9]
    torch.testing.assert_close(some[1], whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_who_looks_at_hidden_states_sees_them_all(house: House) -> None:
    """Zeros in their place would be found out late, if ever."""
    model = shell_of(house.model, house.swarm.blocks(house.whole, WHOLE))
    ids = prompt()
    seen: list[torch.Tensor] = []

    def look(_: Any, args: tuple[torch.Tensor]) -> None:
        seen.append(args[0])

    for each in (house.model, model):
        handle = each.model.norm.register_forward_pre_hook(look)
        each(ids, logits_to_keep=1)
        handle.remove()
    torch.testing.assert_close(seen[1], seen[0], atol=1e-4, rtol=0)
    states = model(ids, logits_to_keep=1, output_hidden_states=True, use_cache=False)
    expected = house.model(ids, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("start", [0, 4, 8], ids=["first", "middle", "last"])
@pytest.mark.parametrize("hop", range(3))
@pytest.mark.parametrize("point", ["not computed", "not answered"])
def test_it_may_die_in_the_middle_of_such_a_prompt(
    house: House, point: str, hop: int, start: int
) -> None:
    """And what is fed to its replacement, then and later, is all there."""
    peers = {s.peer_id for s in house.servers if s.record.record.blocks.start == BORDERS[hop]}

    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        place = destination if point == "not computed" else source
        kind = Step if point == "not computed" else Output
        return isinstance(message, kind) and message.start == start and place in peers

    async def act() -> Fate:
        house.swarm.network.cut(twin.serving(hop).endpoint)
        return Fate.BREAK

    for keep in (1, 6):
        with house.twin(batch=2, chunk_bytes=2 * 4 * 4 * house.whole.hidden_size) as twin:
            trap = house.swarm.trap(fits, act)
            twin.step(10, keep=keep)
            assert trap.sprung
            assert twin.session.recoveries == 1
            for server in house.servers:
                house.swarm.revive(server)
            for victim in range(3):
                twin.kill(victim)
                twin.step(keep=1)
                for server in house.servers:
                    house.swarm.revive(server)
            twin.rollback(7)
            twin.reorder(1, 0)
            twin.step(5, keep=2)
            twin.step(2)
        house.swarm.no_trap()


def test_it_may_be_relayed(house: House) -> None:
    """Who cannot push answers whole, though it is asked for less."""
    with house.twin(chunk_bytes=4 * 4 * house.whole.hidden_size) as twin:
        twin.step(3)
        route = [hop.peer_id for hop in twin.session.hops]
        house.swarm.on_loop(house.swarm.network.block, route[0], route[1])
        twin.step(10, keep=1)
        twin.step(9, keep=3)
        twin.step()
        house.swarm.on_loop(house.swarm.network.unblock, route[0], route[1])
        assert [hop.peer_id for hop in twin.session.hops] == route


def test_who_answers_more_than_was_asked_for_is_gone_round(house: House) -> None:
    liar = house.servers[2]
    make = liar.handler._make

    def deaf(*args: Any) -> Any:
        session = make(*args)
        session._guest = replace(session._guest, is_last=False)
        return session

    liar.handler._make = deaf  # type: ignore[method-assign]
    try:
        with house.twin() as twin:
            twin.step(6, keep=1)
            assert twin.serving(2) is not liar
            assert twin.session.recoveries == 1
    finally:
        del liar.handler._make  # type: ignore[attr-defined]


def test_whole_steps_are_not_cut_where_answers_begin() -> None:
    """With dynamic frequencies a prompt in two pieces is another prompt."""
    pair = Pair("llama", seed=2, replicas=2, rope_type="dynamic", factor=4.0)
    cut: list[int] = []

    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        return isinstance(message, Output) and source == pair.swarm.servers[2].peer_id

    async def act() -> Fate:
        pair.swarm.network.cut(pair.swarm.servers[2].endpoint)
        return Fate.BREAK

    def noting(then: Hook) -> Hook:
        async def note(source: str, destination: str, method: str, frame: bytes) -> Fate:
            message = decode(frame)
            if isinstance(message, Step) and message.start < 24:
                cut.append(message.hidden.shape[1])
            return await then(source, destination, method, frame)

        return note

    with pair.swarm:
        trap = pair.swarm.trap(fits, act)
        pair.swarm.network.before_frame = noting(pair.swarm.network.before_frame)
        pair.same(prompt(tokens=24), max_new_tokens=4)
        pair.swarm.no_trap()
        assert trap.sprung
        assert set(cut) == {24}
        pair.swarm.assert_quiet()
