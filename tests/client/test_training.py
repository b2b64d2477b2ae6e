"""What is trained through a swarm is what would have been trained on one machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm.client.remote import RemoteCache
from swarm.config import ServerLimits
from swarm.errors import NoRoute, UsageError
from swarm.fakes import Fate
from swarm.messages import Back, Message, Train
from tests.client.pairs import Pair, prompt
from tests.client.twins import WHOLE, House
from tests.inprocess import STEADY, Server

RELATIVE = 1e-4  # between our gradients and local ones
FAMILIES = ("llama", "qwen3", "mixtral", "gemma3_text", "bloom")


def agree(got: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    assert got is not None
    assert expected is not None
    assert got.shape == expected.shape
    return bool((got - expected).norm() <= RELATIVE * expected.norm())


def texts(rows: int = 4, tokens: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids, mask and labels of a batch that is padded on the left."""
    ids = prompt(rows, tokens, seed)
    mask = torch.ones_like(ids)
    mask[rows // 2, :5] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Embeddings and head: the rest of what is here."""
    model.requires_grad_(False)
    found = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    return [parameter.requires_grad_() for parameter in dict.fromkeys(found)]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_one_machine(family: str) -> None:
    """Three servers, cut at random; several parts; padded rows; embeddings, head and inputs."""
    pair = Pair(family, seed=20 + FAMILIES.index(family))
    batch = texts(rows=4, tokens=40)
    with pair.swarm:
        results: list[list[Any]] = []
        for model in (pair.local, pair.model):
            parameters = trainable(model)
            embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            by_ids = model(**batch).loss
            inputs = {name: batch[name] for name in ("attention_mask", "labels")}
            by_inputs = model(inputs_embeds=embedded, **inputs).loss
            (by_ids + by_inputs).backward()
            results.append([by_ids.detach(), by_inputs.detach(), embedded.grad])
            results[-1] += [parameter.grad for parameter in parameters]
        assert all(
            agree(got, expected) for got, expected in zip(results[1], results[0], strict=True)
        )
        pair.swarm.assert_quiet()


def served(*servers: Server) -> list[int]:
    return [server.handler._training.served for server in servers]


def test_only_what_the_dead_one_owed_is_done_again() -> None:
    """Whoever is asked for gradients of blocks 2:4 dies of the question."""
    asked: list[Server] = []
    with House("llama") as house:

        def fits(source: str, destination: str, method: str, message: Message) -> bool:
            if not isinstance(message, Back):
                return False
            server = next(server for server in house.servers if server.peer_id == destination)
            if server.record.record.blocks.start == 2:
                asked.append(server)
            return bool(asked)

        async def act() -> Fate | None:
            house.swarm.network.cut(asked[0].endpoint)
            return None

        blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=STEADY)
        hidden = torch.randn(1, 8, house.whole.hidden_size, requires_grad=True)
        output = blocks(hidden)
        house.swarm.trap(fits, act)
        before = sum(served(*house.servers))
        output.sum().backward()
        assert [peer_id for peer_id, _ in house.swarm.router.failures] == [asked[0].peer_id]
        assert (before, sum(served(*house.servers))) == (3, 6)


def sent(house: House) -> list[tuple[str, bool]]:
    """What clients ask servers for from now on: the message, and whether it is to go back."""
    seen: list[tuple[str, bool]] = []

    def note(source: str, destination: str, method: str, message: Message) -> bool:
        if isinstance(message, Train | Back):
            seen.append((message.kind, isinstance(message, Back) or message.backward))
        return False

    house.swarm.trap(note, sleep)
    return seen


async def sleep() -> None: ...


def forget(server: Server) -> None:
    """Whatever it keeps for the way back."""
    keeping = server.handler._training.keeping
    for place in list(keeping._places):
        leave = place.leave
        assert leave is not None
        keeping.free(place)
        leave()


def test_servers_that_kept_their_graphs_are_sent_gradients_alone() -> None:
    """And no others: who forgot them gets everything, and nobody is blamed."""
    with House("llama") as house:
        blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=STEADY)
        hidden = torch.randn(2, 8, house.whole.hidden_size)
        grads: list[torch.Tensor | None] = []
        for forgotten, asked in ((False, [("back", True)] * 3), (True, [("train", True)] * 3)):
            mine = hidden.clone().requires_grad_()
            output = blocks(mine)
            if forgotten:
                for server in house.servers:
                    house.swarm.on_loop(forget, server)
            seen = sent(house)
            output.square().sum().backward()
            grads.append(mine.grad)
            assert [entry for entry in seen if entry in asked] == asked
        assert agree(*grads)
        assert not house.swarm.router.failures


def test_what_nobody_wants_gradients_of_is_not_kept() -> None:
    with House("llama") as house:
        blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=STEADY)
        hidden = torch.randn(2, 8, house.whole.hidden_size)

        def kept() -> int:
            return sum(server.handler._training.keeping.used for server in house.servers)

        output = blocks(hidden.requires_grad_())
        assert kept()
        del output
        house.swarm.wait_until(lambda: not kept())
        blocks.train()(hidden.detach())
        assert not kept()


def test_blocks_that_are_held_in_other_pieces_by_then() -> None:
    """A server that went forward through four blocks is gone; two others have two each."""
    with House("llama", spans=((0, 4), (4, 6))) as house:
        blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=STEADY)
        hidden = torch.randn(2, 8, house.whole.hidden_size)
        expected = hidden.clone().requires_grad_()
        blocks(expected).square().sum().backward()
        again = hidden.clone().requires_grad_()
        output = blocks(again)
        house.swarm.cut(house.servers[0])
        house.add(0, 2)
        house.add(2, 4)
        output.square().sum().backward()
        assert agree(again.grad, expected.grad)


def test_batches_that_do_not_fit_are_halved_and_long_texts_are_refused() -> None:
    row = 8 * 48 * 4  # bytes of a text of 8 tokens
    limits = ServerLimits(send_timeout=2.0, training_bytes=8 * row, training_wait=5.0)
    with House("llama", limits=limits) as house:
        blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=STEADY)
        hidden = torch.randn(7, 8, house.whole.hidden_size)
        whole, parts = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        blocks(whole).square().sum().backward()
        for text in range(7):
            blocks(parts[text : text + 1]).square().sum().backward()
        assert agree(whole.grad, parts.grad)
        with pytest.raises(UsageError, match="texts of 80 tokens are too long"):
            blocks(torch.randn(1, 80, house.whole.hidden_size, requires_grad=True))


def test_a_slow_server_gets_less() -> None:
    """Three of four parts go to the one that says it is three times as quick."""
    with House("llama", spans=((0, 6), (0, 6))) as house:
        blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=STEADY)
        workers = blocks.connection.workers
        for server, pace in zip(house.servers, (1.0, 3.0), strict=True):
            leg = workers.holder([server.record], WHOLE, 1)
            assert leg is not None
            workers.give(leg, 1)
            workers.took(leg, 1, pace * 6)
            workers.take(leg, 1e9)
        hidden = torch.randn(4, 128, house.whole.hidden_size, requires_grad=True)
        blocks(hidden)
        assert served(*house.servers) == [3, 1]


def test_autograd_s_own_rules_hold() -> None:
    with House("llama") as house:
        blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=STEADY)
        hidden = torch.randn(2, 8, house.whole.hidden_size, requires_grad=True)
        output = blocks(hidden).sum()
        output.backward(retain_graph=True)
        once = hidden.grad.clone()  # type: ignore[union-attr]
        output.backward()
        assert agree(hidden.grad, 2 * once)
        with pytest.raises(UsageError, match="gradients of gradients"):
            torch.autograd.grad(blocks(hidden).sum(), hidden, create_graph=True)
        middle = hidden * 1.0
        output = blocks(middle).sum()
        with torch.no_grad():
            middle.add_(1.0)
        with pytest.raises(RuntimeError, match="modified in place"):
            output.backward()
        with blocks.inference_session(8) as session:
            cache = RemoteCache(session)
            with pytest.raises(UsageError, match="session"):
                blocks(hidden, past_key_values=cache)
        slow = blocks[1:5](hidden)
        assert slow.requires_grad
        assert slow.shape == hidden.shape
        del output, slow  # or servers would keep their graphs for a while


def test_half_precision_on_the_client_meets_servers_in_float32() -> None:
    with House("llama") as house:
        blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=STEADY)
        hidden = torch.randn(2, 8, house.whole.hidden_size, dtype=torch.bfloat16)
        exact, half = hidden.float().requires_grad_(), hidden.requires_grad_()
        blocks(exact).sum().backward()
        output = blocks(half)
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        assert half.grad is not None
        assert exact.grad is not None
        assert half.grad.dtype == torch.bfloat16
        torch.testing.assert_close(half.grad.float(), exact.grad, rtol=2e-2, atol=2e-2)


def test_compressed_gradients_are_nearly_the_same_for_a_quarter_of_the_bytes() -> None:
    with House("llama") as house:
        grads: list[Any] = []
        for codec in ("none", "mxint8"):
            blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=STEADY, codec=codec)  # type: ignore[arg-type]
            hidden = torch.linspace(-1, 1, 2 * 8 * 48).view(2, 8, 48).requires_grad_()
            blocks(hidden).square().sum().backward()
            grads.append(hidden.grad)
        assert 0 < (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()


def test_nobody_serves_some_blocks() -> None:
    with House("llama", spans=((0, 2), (4, 6))) as house:
        impatient = replace(STEADY, recovery=0.3)
        blocks = house.swarm.blocks(house.whole, WHOLE, timeouts=impatient)
        hidden = torch.randn(1, 8, house.whole.hidden_size, requires_grad=True)
        with pytest.raises(NoRoute, match="0:6"):
            blocks(hidden)
