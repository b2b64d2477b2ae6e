"""Adapters inside blocks that others serve are PEFT's own: learnt, saved, loaded and used alike."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from swarm.client.remote import RemoteBlocks
from swarm.client.training_loans import Loans
from swarm.errors import UsageError
from swarm.fakes import Fate
from swarm.messages import Message, Piece, Train
from swarm.server.adapters_stock import Stock
from tests.client.pairs import GREEDY, Killer, Pair, prompt, shell_of
from tests.client.test_training import FAMILIES, agree, texts
from tests.client.twins import WHOLE
from tests.inprocess import STEADY, InProcessSwarm, span_of
from tests.models.tiny import LAYERS, tiny_model

TARGETS = ["q_proj", "v_proj", "o_proj", "query_key_value"]  # those that a family has


def lora(**options: Any) -> LoraConfig:
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    return LoraConfig(**defaults | options)


def learning(model: Any, seed: int | None = None, spread: float = 0.1) -> dict[str, Any]:
    """What has `requires_grad`; with a seed, filled with numbers that are large enough to show."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for index, name in enumerate(sorted(found) if seed is not None else ()):
        generator = torch.Generator().manual_seed(1000 * (seed or 0) + index)
        found[name].data.normal_(0, spread, generator=generator)
    return found


def take_back(pair: Pair) -> None:
    """What training has lent."""
    pair.swarm.loop.call(pair.blocks.connection.loans.close())
    pair.swarm.assert_quiet()


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    pair = Pair("llama", seed=80, replicas=2)
    with pair.swarm:
        yield pair


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_and_write_as_on_one_machine(family: str) -> None:
    """Three servers, cut at random; padded rows; gradients of all factors; greedy tokens."""
    pair = Pair(family, seed=60 + FAMILIES.index(family))
    batch = texts(rows=4, tokens=36)
    grads: list[dict[str, Any]] = []
    with pair.swarm:
        for model in (pair.local, pair.model):
            model.requires_grad_(False)
            model.add_adapter(lora())
            parameters = learning(model, seed=1, spread=0.3)
            model(**batch).loss.backward()
            grads.append({name: p.grad for name, p in parameters.items()})
        assert list(grads[1]) == list(grads[0])  # PEFT's names, and in its order
        assert len(grads[0]) in (6 * LAYERS, 2 * LAYERS)
        assert all(agree(grads[1][name], grads[0][name]) for name in grads[0])
        ids = batch["input_ids"]
        pair.same(ids, attention_mask=batch["attention_mask"])
        adapted = pair.same(ids[:1])
        for model in (pair.local, pair.model):
            model.disable_adapters()
        assert not torch.equal(pair.same(ids[:1]), adapted)
        take_back(pair)


def die_at(pair: Pair, frame: int) -> None:
    """Whoever the `frame`-th frame of training is for, or from, dies before that arrives."""
    ends: list[str] = []

    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        if isinstance(message, Train | Piece):
            ends.append(source if isinstance(message, Piece) else destination)
        return len(ends) >= frame

    async def act() -> Fate | None:
        for server in pair.swarm.servers:
            if server.peer_id in ends[frame - 1 :]:
                pair.swarm.network.cut(server.endpoint)
        return None

    pair.swarm.trap(fits, act)


def revive_all(pair: Pair) -> None:
    pair.swarm.no_trap()
    for server in pair.swarm.servers:
        pair.swarm.revive(server)


def test_fifty_steps_while_servers_die_give_the_same_curve_and_adapter(tmp_path: Path) -> None:
    """And what was saved loads into the local model unchanged, and the other way round."""
    pair, rng = Pair("qwen3", seed=7, replicas=2), random.Random(5)
    deaths = 0
    curves: list[list[float]] = []
    with pair.swarm:
        for model in (pair.local, pair.model):
            model.requires_grad_(False)
            model.add_adapter(lora(init_lora_weights="gaussian"))
            parameters = learning(model)
            for index, name in enumerate(parameters):
                if "lora_A" in name:
                    generator = torch.Generator().manual_seed(index)
                    parameters[name].data.normal_(0, 0.1, generator=generator)
            optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
            losses: list[float] = []
            for step in range(50):
                if model is pair.model and step % 5 == 1:
                    deaths += 1
                    die_at(pair, rng.randrange(1, 20))
                optimizer.zero_grad()
                loss = model(**texts(rows=2, tokens=10, seed=step % 2)).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                revive_all(pair)
            curves.append(losses)
        assert len(pair.swarm.router.failures) >= deaths // 2  # pieces may be from the client
        local, remote = map(torch.tensor, curves)
        assert local[-1] < 0.6 * local[0]
        assert (remote - local).abs().max() < 1e-3
        ours, theirs = learning(pair.model), learning(pair.local)
        for name, parameter in theirs.items():
            torch.testing.assert_close(ours[name], parameter, atol=2e-3, rtol=0)

        pair.model.save_pretrained(tmp_path / "ours")
        pair.local.save_pretrained(tmp_path / "theirs")
        assert (tmp_path / "ours" / "adapter_model.safetensors").exists()
        fresh: Any = tiny_model("qwen3", 7)
        fresh = PeftModel.from_pretrained(fresh, str(tmp_path / "ours")).eval()
        fresh.generation_config.eos_token_id = None
        ids = prompt(2, 8)
        expected = pair.local.generate(ids, **GREEDY)
        assert torch.equal(pair.model.generate(ids, **GREEDY), expected)
        assert torch.equal(fresh.generate(ids, **GREEDY), expected)
        other = shell_of(fresh_local("qwen3", 7), another(pair))
        other.load_adapter(str(tmp_path / "theirs"))
        assert torch.equal(other.generate(ids, **GREEDY), expected)
        assert torch.equal(other.generate(ids[:1], **GREEDY), expected[:1])
        other = shell_of(fresh_local("qwen3", 7), another(pair))
        wrapped: Any = PeftModel.from_pretrained(other.adaptable(), str(tmp_path / "ours"))
        assert torch.equal(wrapped.generate(ids, **GREEDY), expected)
        take_back(pair)


def another(pair: Pair) -> RemoteBlocks:
    """The same blocks for another model."""
    return RemoteBlocks(pair.blocks.connection, WHOLE)


def fresh_local(family: str, seed: int) -> PreTrainedModel:
    model: Any = tiny_model(family, seed)
    model.generation_config.eos_token_id = None
    return model


def test_eight_clients_with_eight_adapters_share_a_server() -> None:
    """All at the same time, in the same passes; each gets what PEFT gives on its own machine."""
    local: Any = fresh_local("llama", 3)
    span = span_of(local, 0, LAYERS)
    ids = prompt(1, 9)
    options: dict[str, Any] = GREEDY | {"max_new_tokens": 24}
    with InProcessSwarm() as swarm:
        server = swarm.add(span)
        clients: list[Any] = []
        expected: list[torch.Tensor] = []
        for client in range(8):
            model = shell_of(local, swarm.blocks(span, WHOLE, client=50 + client))
            own: Any = tiny_model("llama", 3)
            for each in (model, own):
                each.generation_config.eos_token_id = None
                each.add_adapter(lora(r=2 + client % 3))
                learning(each, seed=client)
            clients.append(model)
            expected.append(own.generate(ids, **options))
        got: dict[int, torch.Tensor] = {}

        def generate(client: int) -> None:
            got[client] = clients[client].generate(ids, **options)

        threads = [threading.Thread(target=generate, args=(client,)) for client in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [got[client].tolist() for client in range(8)] == [e.tolist() for e in expected]
        assert len({str(tokens.tolist()) for tokens in expected}) == 8
        assert server.executor.backend.shared_passes > 0
        swarm.assert_quiet()


def test_a_text_goes_on_with_its_adapter_when_servers_die(shared: Pair) -> None:
    for model in (shared.local, shared.model):
        model.requires_grad_(False)
        model.add_adapter(lora(), "dying")
        model.set_adapter("dying")
        learning(model, seed=5)
    ids = prompt(1, 8)
    with shared.model.inference_session(max_length=40) as session:
        shared.same(ids, killer=Killer(shared, session, every=4))
        assert session.recoveries >= 2
    shared.swarm.assert_quiet()


def test_adapters_go_along_when_sessions_move_and_stand_by() -> None:
    """A server that leaves hands its session over; one that dies has a second one beside it."""
    pair = Pair("llama", seed=81, replicas=2)
    spans = [server.handler._span for server in pair.swarm.servers]
    blocks = pair.swarm.blocks(spans[0], WHOLE, standby_after=20)
    pair.model = shell_of(pair.local, blocks)
    with pair.swarm:
        for model in (pair.local, pair.model):
            model.add_adapter(lora())
            learning(model, seed=6)
        with pair.model.inference_session(max_length=80) as session:
            text = pair.same(prompt())
            leaving = pair.swarm.serving(session, 0)
            pair.swarm.loop.call(leaving.handler.leave())
            pair.swarm.wait_until(lambda: session.moves == 1)
            text = pair.same(text, max_new_tokens=8)
            assert session.recoveries == 0
            leaving.handler.draining = False
            pair.swarm.revive(leaving)
            pair.swarm.wait_until(lambda: any(hop.trusted > 20 for hop in session.standbys))
            spare = session.standbys[0]
            pair.swarm.cut(pair.swarm.serving(session, spare.blocks.start))
            pair.same(text, max_new_tokens=6)
            assert spare in session.hops
        pair.swarm.loop.call(blocks.connection.loans.close())
        pair.swarm.assert_quiet()


def test_a_loan_that_nobody_needs_ends(shared: Pair) -> None:
    model = shell_of(fresh_local("llama", 80), another(shared))
    model.add_adapter(lora(), "brief")
    learning(model, seed=7)
    model.generate(prompt(), **GREEDY)
    shared.swarm.assert_quiet()
    model.delete_adapter("brief")
    assert model.remote_blocks.bundles() is None


def test_who_does_not_have_what_it_announces_is_remembered_and_little_else() -> None:
    """Weights that are trained have another name with each step."""
    loans, names = Loans(), [number.to_bytes(32) for number in range(1000)]
    for name in names:
        loans.lost("peer", name)
    told: Any = SimpleNamespace(peer_id="peer", adapters=[SimpleNamespace(id=names[-1])])
    assert not loans._has(told, names[-1])
    assert len(loans._doubted) < 100


def test_what_is_merged_in_peft_s_ways_works_too(shared: Pair) -> None:
    """Two adapters at a time, rank-stabilised scaling, and `get_peft_model`."""
    wrapped: list[Any] = []
    local: Any = fresh_local("llama", 80)
    remote: Any = shell_of(local, another(shared))
    for model in (local, remote.adaptable()):
        tuned: Any = get_peft_model(model, lora(use_rslora=True), adapter_name="one")
        tuned.add_adapter("two", lora(r=2, target_modules=["q_proj", "k_proj"]))
        tuned.base_model.set_adapter(["one", "two"])
        learning(tuned, seed=9)
        wrapped.append(tuned)
    batch = texts(rows=2, tokens=9)
    losses = [model(**batch).loss for model in wrapped]
    for loss in losses:
        loss.backward()
    grads = [learning(model) for model in wrapped]
    assert len(grads[0]) == 10 * LAYERS
    assert all(agree(grads[1][name].grad, grads[0][name].grad) for name in grads[0])
    take_back(shared)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lora_dropout": 0.1}, "dropout"),
        ({"lora_bias": True}, "plain LoRA"),
        ({"r": 1000}, "at most 512"),
        ({"init_lora_weights": "pissa"}, "begins with other weights"),
        ({"modules_to_save": ["o_proj"]}, "changes self_attn.o_proj"),
        ({"modules_to_save": ["layernorm"]}, "changes input_layernorm"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, "changes input_layernorm"),
    ],
)
def test_what_servers_cannot_do_is_said(options: dict[str, Any], why: str) -> None:
    pair = Pair("llama", seed=90)
    with pair.swarm:
        pair.model.add_adapter(lora(**options))
        with pytest.raises(UsageError, match=why):
            pair.model.train()(**texts(rows=1, tokens=6))


@pytest.mark.parametrize("kind", ["ia3", "norms"])
def test_what_would_be_loaded_in_part_is_refused_and_leaves_nothing(
    shared: Pair, tmp_path: Path, kind: str
) -> None:
    """PEFT, and transformers, leave out what has no place."""
    config: Any = lora(modules_to_save=["post_attention_layernorm"])
    if kind == "ia3":
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    other: Any = get_peft_model(fresh_local("llama", 80), config)
    other.save_pretrained(tmp_path)
    model = shell_of(fresh_local("llama", 80), another(shared))
    with pytest.raises(UsageError, match="LoRA"):
        model.load_adapter(str(tmp_path))
    assert model.remote_blocks.bundles() is None
    model.add_adapter(lora())
    assert model.remote_blocks.bundles() is not None


def test_what_is_here_can_be_adapted_too(shared: Pair) -> None:
    local: Any = fresh_local("llama", 80)
    plain, got = local.generate(prompt(), **GREEDY), list[torch.Tensor]()
    for model in (shell_of(local, another(shared)), local):
        model.add_adapter(lora(target_modules=["q_proj", "embed_tokens", "lm_head"]))
        learning(model, seed=4, spread=0.3)
        got.append(model.generate(prompt(), **GREEDY))
    assert torch.equal(*got)
    assert not torch.equal(got[0], plain)


def test_numbers_that_are_not_finite_never_leave(shared: Pair) -> None:
    model = shell_of(fresh_local("llama", 80), another(shared))
    model.add_adapter(lora(), "sick")
    model.set_adapter("sick")
    next(iter(learning(model).values())).data.fill_(torch.inf)
    with pytest.raises(UsageError, match="not finite"):
        model(**texts(rows=1, tokens=6))
    with pytest.raises(UsageError, match="not finite"):
        model.generate(prompt(), **GREEDY)


def test_an_adapter_that_is_too_large_for_servers_is_said() -> None:
    pair = Pair("llama", seed=91)
    for server in pair.swarm.servers:
        server.handler._loans.stock = Stock(1000)
    with pair.swarm:
        pair.model.add_adapter(lora())
        with pytest.raises(UsageError, match="does not take this adapter"):
            pair.model(**texts(rows=1, tokens=6))
        begun = perf_counter()
        with pytest.raises(UsageError, match=r"does not take this adapter.* smaller"):
            pair.model.generate(prompt(), **GREEDY)
        assert perf_counter() - begun < STEADY.recovery / 2  # not after looking for others
        assert not pair.swarm.router.failures  # without it they are as good as before
        take_back(pair)


def test_who_has_no_room_for_an_adapter_is_passed_by() -> None:
    pair = Pair("llama", seed=92, replicas=2)
    for server in pair.swarm.servers[:3]:
        server.handler._loans.stock = Stock(1000)
    with pair.swarm:
        for model in (pair.local, pair.model):
            model.add_adapter(lora())
            learning(model, seed=3)
        pair.same(prompt())
        assert not pair.swarm.router.failures
        take_back(pair)
