"""Adapters that a server's owner preloads: the same as PEFT's, for all who ask, and announced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

from swarm.errors import ErrorCode, UsageError
from swarm.messages import Info, Load
from swarm.models.adapters_peft import read_adapter
from swarm.models.bundles import Bundles, Resident
from swarm.server.choice import ServerConfig
from swarm.server.residents import MAX_RESIDENTS, Shelf, announced
from tests.client.pairs import Pair, prompt, shell_of
from tests.client.test_training_lora import another, fresh_local, learning, lora
from tests.hub import serve
from tests.inprocess import span_of
from tests.models.tiny import LAYERS, tiny_model

FAMILY, SEED = "llama", 31


@pytest.fixture(scope="module")
def poet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PEFT writes it."""
    model: Any = tiny_model(FAMILY, SEED)
    model.add_adapter(lora())
    learning(model, seed=2, spread=0.3)
    folder = tmp_path_factory.mktemp("adapters") / "a-very-long-poet"
    model.save_pretrained(folder)
    return folder


def shelf(*sources: str | Path, budget: int = 1 << 20) -> Shelf:
    found = Shelf.find(ServerConfig(adapters=tuple(map(str, sources))))
    return Shelf(found.folders, budget)


def test_names_are_short_and_different(poet: Path) -> None:
    assert list(shelf(poet, f"poet={poet}").folders) == ["a-very-long", "poet"]
    for sources in ((poet, poet), (f"more-than-eleven={poet}",), (poet.parent,), ("/nowhere",)):
        with pytest.raises(UsageError):
            shelf(*sources)


def test_another_program_s_cache_is_enough(
    poet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the Hub, without a network: an adapter's repo has no config.json."""
    with serve({"me/poet": poet}) as hub:
        hub.use(monkeypatch, tmp_path)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            hf_hub_download("me/poet", file, cache_dir=constants.HF_HUB_CACHE)
        hub.down = True
        (folder,) = shelf("me/poet").folders.values()
    model = tiny_model(FAMILY, SEED)
    found = read_adapter(model.config, folder, torch.float32)
    assert found.id == read_adapter(model.config, poet, torch.float32).id


def test_there_are_no_more_than_a_server_can_tell_of(poet: Path) -> None:
    """Else whoever asks it about itself would get no answer."""
    many = [f"poet {i}={poet}" for i in range(MAX_RESIDENTS + 1)]
    with pytest.raises(UsageError, match="preload fewer"):
        shelf(*many)
    names = shelf(*many[1:]).folders
    assert len(Info(record=b"r", load=Load(), adapters=dict.fromkeys(names, bytes(32))).adapters)


def test_each_server_has_its_part_and_all_the_same_hash(poet: Path) -> None:
    model = tiny_model(FAMILY, SEED)
    parts = [
        shelf(poet).load(model.config, span_of(model, *ends))[0] for ends in ((0, 2), (1, LAYERS))
    ]
    assert [sorted(part.adapter) for part in parts] == [[0, 1], list(range(1, LAYERS))]
    assert parts[0].id == parts[1].id == read_adapter(model.config, poet, torch.float32).id
    (told,) = announced(parts[:1])
    assert str(told) == f"a-very-long@{parts[0].id.hex()[:16]}"
    with pytest.raises(UsageError, match="preload fewer"):
        shelf(poet, budget=100).load(model.config, span_of(model, 0, 2))


def test_what_is_more_than_lora_in_blocks_or_does_not_fit_is_refused(
    poet: Path, tmp_path: Path
) -> None:
    other: Any = tiny_model("llama", 1)
    other.add_adapter(lora(target_modules=["q_proj", "lm_head"]))
    other.save_pretrained(tmp_path / "head")
    shutil.copytree(poet, tmp_path / "wide")
    config = json.loads((poet / "adapter_config.json").read_text()) | {"r": 7}
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(poet, tmp_path / "noise")
    (tmp_path / "noise" / "adapter_model.safetensors").write_bytes(b"\xff" * 99)
    for name in ("head", "wide", "noise"):
        with pytest.raises(UsageError, match="adapter in"):
            read_adapter(other.config, tmp_path / name, torch.float32)


def pair_with(poet: Path, count: int = 3) -> tuple[Pair, Resident]:
    """Every block on two servers, of which the first `count` have the adapter."""
    pair = Pair(FAMILY, SEED)
    for place, ends in enumerate(pair.cuts * 2):
        span = span_of(pair.local, *ends)
        if place < count:
            span.residents = shelf(poet).load(pair.local.config, span)
        pair.swarm.add(span)
    for server in pair.swarm.servers[:3]:  # those without, that a pair has
        pair.swarm.router.servers.pop(server.peer_id)
    resident = pair.swarm.servers[3].handler._span.residents[0]
    pair.local.load_adapter(str(poet))
    return pair, resident


def test_who_loads_the_same_sends_nothing_to_who_has_it_and_all_to_who_has_not(
    poet: Path,
) -> None:
    pair, _ = pair_with(poet)
    with pair.swarm:
        pair.model.load_adapter(str(poet))
        having, lacking = pair.swarm.servers[3:6], pair.swarm.servers[6:]
        with pair.model.inference_session(max_length=40) as session:
            first = pair.same(prompt())
            assert {hop.peer_id for hop in session.hops} == {s.peer_id for s in having}
            assert not any(s.handler._loans.stock.kept_bytes for s in having)
            for server in having:
                pair.swarm.cut(server)
            longer = pair.same(torch.cat([first, prompt(seed=5)], dim=1))
            assert {hop.peer_id for hop in session.hops} == {s.peer_id for s in lacking}
            assert all(s.handler._loans.stock.kept_bytes for s in lacking)
            assert longer.shape[1] > first.shape[1]


def test_its_hash_is_all_that_is_needed(poet: Path) -> None:
    pair, resident = pair_with(poet, count=6)
    with pair.swarm:
        pair.model.remote_blocks.announced = Bundles(resident.id, {}, ())
        pair.same(prompt())
        pair.same(prompt(2, 7, seed=4), num_beams=2)
        with pytest.raises(UsageError, match="load its weights"):
            pair.model.train()(prompt())
        with pytest.raises(UsageError, match="without active_adapter"):
            pair.model.add_adapter(lora())


def test_who_does_not_have_it_says_so_and_others_are_asked(poet: Path) -> None:
    pair, resident = pair_with(poet)
    with pair.swarm:
        router = pair.swarm.router
        router.servers = dict(reversed(router.servers.items()))  # those without come first
        blocks = another(pair)
        blocks.announced = Bundles(resident.id, {}, ())
        pair.model = shell_of(fresh_local(FAMILY, SEED), blocks)
        pair.same(prompt())
        codes = {getattr(error, "code", None) for _, error in router.failures}
        assert codes == {ErrorCode.UNKNOWN_ADAPTER}
        assert len(router.failures) == 3


def test_a_server_started_anew_without_it_is_lent_it(poet: Path) -> None:
    """Its record tells of it still."""
    pair, _ = pair_with(poet, count=6)
    with pair.swarm:
        pair.model.load_adapter(str(poet))
        for server in pair.swarm.servers:
            server.handler._loans.stock._residents.clear()
            server.handler._loans.stock._shared.clear()
        pair.same(prompt())
        assert not pair.swarm.router.failures
        pair.swarm.loop.call(pair.blocks.connection.loans.close())
        pair.swarm.assert_quiet()
