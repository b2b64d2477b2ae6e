"""The monitor sees what is announced, remembers it, and says so when it sees nothing."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.dht.memory import MemoryDht, Values
from swarm.dht.records import ServerRecord, ServerState, keys_of, sign_record
from swarm.errors import PeerUnavailable, UsageError
from swarm.identity import Identity
from swarm.monitor import watcher as module
from swarm.monitor.ledger import Ledger
from swarm.monitor.picture import Joining, model_key
from swarm.monitor.pulse import Answer
from swarm.monitor.watcher import Watcher
from swarm.types import BlockRange, ModelId
from tests.monitor.simulated import MODEL, record

ADA, BEA = Identity.ephemeral(), Identity.ephemeral()
JOINING = Joining(("/ip4/192.0.2.1/tcp/1/p2p/Qm",))
KEY = model_key(MODEL)


def announce(
    dht: MemoryDht, identity: Identity, blocks: str = "0:8", **fields: Any
) -> ServerRecord:
    """As a server does it."""
    told = record(0, blocks, peer_id=identity.peer_id, announced_at=int(1000 * dht.time), **fields)
    signed = sign_record(told, identity, None)
    theirs = MemoryDht(identity.peer_id, dht.values)
    theirs.time = dht.time
    asyncio.run(theirs.store(keys_of(told, None), signed.data, told.kept_until))
    return told


class Story:
    """A watcher whose clock is the DHT's."""

    def __init__(self, values: Values | None = None, path: Path | None = None, **more: Any):
        self.dht = MemoryDht("me", values)
        clock = lambda: self.dht.time  # noqa: E731
        self.watcher = Watcher(self.dht, None, Ledger(path), JOINING, clock=clock, **more)

    def look(self, after: float = 3.0) -> dict[str, Any]:
        async def once() -> None:
            await self.watcher.discover()
            await self.watcher.look()
            await self.watcher.ask()
            self.watcher.tell()
            self.watcher.note()

        self.dht.time += after
        asyncio.run(once())
        return self.watcher.feed.state

    def end(self) -> None:
        async def end() -> None:
            async with self.watcher.running():
                pass

        asyncio.run(end())


def test_servers_come_and_go_and_the_feed_says_what_changed() -> None:
    story = Story()
    assert story.look()["models"] == {}
    announce(story.dht, ADA, blocks="0:24")
    assert story.look()["models"][KEY]["health"] == "degraded"
    announce(story.dht, BEA, blocks="0:24", public_name="Bea")
    model = story.look()["models"][KEY]
    assert model["health"] == "healthy"
    assert [event[1:4] for event in model["events"]] == [["joined", BEA.peer_id, "Bea"]]
    story.dht.time += 1
    announce(story.dht, BEA, blocks="0:24", public_name="Bea", state=ServerState.OFFLINE)
    model = story.look()["models"][KEY]
    assert (model["health"], list(model["servers"])) == ("degraded", [ADA.peer_id])
    assert model["events"][-1][1] == "left"


def test_what_a_server_says_when_asked_may_be_its_farewell() -> None:
    """Before it is in the DHT; or something about another model than it announces."""
    story = Story()
    told = announce(story.dht, ADA, blocks="0:24")
    announce(story.dht, BEA, blocks="0:24")
    answers: dict[str, Answer] = {}
    story.watcher.pulse = SimpleNamespace(answers=answers, unreachable=(), beat=_nobody)  # type: ignore[assignment]
    assert len(story.look()["models"][KEY]["servers"]) == 2
    changes: dict[str, Any] = {"announced_at": told.announced_at + 1}
    other = told.model_copy(update=changes | {"num_blocks": 4096, "blocks": BlockRange(0, 4000)})
    answers[ADA.peer_id] = Answer(record=other)
    assert story.look()["models"][KEY]["servers"][ADA.peer_id]["blocks"] == [0, 24]
    farewell = told.model_copy(update=changes | {"state": ServerState.OFFLINE})
    answers[ADA.peer_id] = Answer(record=farewell)
    model = story.look()["models"][KEY]
    assert list(model["servers"]) == [BEA.peer_id]
    assert model["events"][-1][1:3] == ["left", ADA.peer_id]


async def _nobody(*_: Any) -> int:
    return 0


def test_only_wanted_models_are_watched_and_never_too_many(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MODELS", 3)
    values: Values = {}
    story, choosy = Story(values), Story(values, wanted=["model 4"])
    for index in range(6):
        identity = Identity.ephemeral()
        announce(story.dht, identity, model=ModelId(f"model {index}", "ab" * 32))
    assert len(story.look()["models"]) == 3
    [model] = choosy.look()["models"].values()
    assert model["name"] == "model 4"


def test_a_model_may_be_forgotten_while_another_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody has served it for a day; and that took the whole monitor down."""
    story = Story()
    announce(story.dht, ADA, blocks="0:24")
    announce(story.dht, BEA, blocks="0:24", model=ModelId("old", MODEL.fingerprint))
    assert len(story.look()["models"]) == 2
    story.dht.time += module.DAY + 1.0
    announce(story.dht, ADA, blocks="0:24")

    async def look_while_one_is_forgotten() -> None:
        told = asyncio.Event()
        get_many = story.dht.get_many

        async def slowly(*arguments: Any, **options: Any) -> Any:
            await told.wait()
            return await get_many(*arguments, **options)

        await story.watcher.look()
        monkeypatch.setattr(story.dht, "get_many", slowly)
        looking = asyncio.create_task(story.watcher.look())
        await asyncio.sleep(0)
        story.watcher.tell()
        story.watcher.note()
        told.set()
        await looking
        monkeypatch.undo()

    asyncio.run(look_while_one_is_forgotten())
    assert list(story.look()["models"]) == [KEY]


def test_a_dht_that_does_not_answer_is_told_and_the_last_picture_stays() -> None:
    story = Story()
    announce(story.dht, ADA)
    state = story.look()
    assert (state["sees"], story.watcher.sees) == (True, True)
    story.dht.down = True
    story.dht.time += 300
    try:
        asyncio.run(story.watcher.discover())
    except PeerUnavailable:
        story.watcher.tell()
    state = story.watcher.feed.state
    assert state["sees"] is False
    assert ADA.peer_id in state["models"][KEY]["servers"]


def test_a_restart_goes_on_where_the_last_one_ended_even_if_nobody_serves_by_then(
    tmp_path: Path,
) -> None:
    path = tmp_path / "h.sqlite"
    story = Story(path=path)
    announce(story.dht, ADA, public_name="Ada")
    for _ in range(5):
        story.look(60.0)
        announce(story.dht, ADA, public_name="Ada")
    story.end()

    again = Story(path=path)
    again.dht.time = story.dht.time + 600
    model = again.look()["models"][KEY]
    assert (model["name"], model["health"], model["servers"]) == (MODEL.name, "broken", {})
    history = again.watcher.watched[KEY].history
    assert len(history.minutes) >= 5
    assert history.served[ADA.peer_id].name == "Ada"
    assert history.served[ADA.peer_id].block_seconds >= 4 * 60 * 8
    again.look(90_000.0)
    assert KEY not in again.watcher.watched, "a model that nobody served for a day is forgotten"
    again.end()


def test_a_defect_ends_the_program_and_the_history_is_kept_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(path=tmp_path / "h.sqlite")
    announce(story.dht, ADA)
    story.look()

    async def broken() -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(story.watcher, "look", broken)

    async def live() -> None:
        async with story.watcher.running():
            await asyncio.Event().wait()

    with pytest.raises(ZeroDivisionError):
        asyncio.run(live())
    assert KEY in Ledger(tmp_path / "h.sqlite").load(story.dht.time)


def test_what_is_wrong_inside_is_raised_as_it_is() -> None:
    async def live() -> None:
        async with Story().watcher.running():
            raise UsageError("the port is in use")

    with pytest.raises(UsageError, match="port"):
        asyncio.run(live())
