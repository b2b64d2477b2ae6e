"""Real processes on loopback that really die: what the product promises to people."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import AutoDistributedModelForCausalLM, LocalSwarm
from swarm.client.hop import Hop
from swarm.client.network import SwarmNetwork
from swarm.client.remote import InferenceSession
from swarm.client.session import RemoteSession
from swarm.config import ClientConfig, ClientTimeouts
from swarm.dht.directory import list_models
from swarm.errors import NoRoute
from swarm.messages import Output
from swarm.models.demo import DEMO_MODEL
from tests.nursery import QuickSwarm

PROMPT = "And it came to pass"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64}
SPANS = ("0:8", "8:16", "16:24")


@pytest.fixture(scope="module")
def local() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)(PROMPT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def expected(local: Any, ids: torch.Tensor) -> list[int]:
    return local.generate(ids, **GREEDY)[0].tolist()


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    """Three spans; tests that kill a server leave as many as they found."""
    with QuickSwarm(spans=SPANS, dtype="float32") as swarm:
        yield swarm
        SwarmNetwork.leave_all()


def join(swarm: LocalSwarm, chunk_bytes: int = 1 << 20, **timeouts: float) -> Any:
    config = ClientConfig(timeouts=ClientTimeouts(**timeouts), chunk_bytes=chunk_bytes)
    return AutoDistributedModelForCausalLM.from_pretrained(
        None, initial_peers=swarm.peers, config=config
    )


def counters(swarm: LocalSwarm) -> list[Counter[str]]:
    """What the living servers of each span have counted."""
    network = SwarmNetwork.connect(swarm.peers, None)
    model = next(iter(network.loop.call(list_models(network.dht)))).model
    servers = network.router(model, 24, ClientConfig(ClientTimeouts(refresh=0.0))).view.servers
    by_peer = {server.record.peer_id: server for server in servers}
    sums = [Counter[str]() for _ in SPANS]
    for server in swarm.servers:
        if server.alive:
            asked = network.ask(by_peer[server.peer_id])
            sums[SPANS.index(str(server.blocks))].update(asked.counters)
    return sums


def in_use(swarm: LocalSwarm, session: InferenceSession, hop: int) -> int:
    """The index of the process that serves this hop of the route."""
    address = str(session.hops[hop].endpoint)
    return next(s.index for s in swarm.servers if s.alive and s.address == address)


class AtToken:
    """A streamer that acts before certain token positions are computed."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self._actions = actions
        self.count = 0

    def put(self, value: torch.Tensor) -> None:
        if value.numel() == 1:  # not the prompt
            self.count += 1
            self._actions.get(self.count, lambda: None)()

    def end(self) -> None:
        self.count = -1


def test_a_quiet_run_pushes_and_is_exact(
    swarm: LocalSwarm, ids: torch.Tensor, expected: list[int]
) -> None:
    model = join(swarm)
    before = counters(swarm)
    with model.inference_session(max_length=128) as session:
        assert model.generate(ids, **GREEDY)[0].tolist() == expected
        SwarmNetwork.leave_all()
        assert [str(hop.blocks) for hop in session.hops] == list(SPANS)
        assert session.recoveries == 0
    came = [after - earlier for after, earlier in zip(counters(swarm), before, strict=True)]
    assert came[0]["steps_from_clients"] == 64  # the prompt, and each token but the last
    assert [c["steps_from_clients"] for c in came[1:]] == [0, 0]
    assert [c["steps_from_servers"] for c in came] == [0, 64, 64]


def test_threads_share_passes_and_get_their_own_tokens(
    swarm: LocalSwarm, local: Any, ids: torch.Tensor
) -> None:
    model = join(swarm)
    prompts = [ids[:, : 1 + i % ids.shape[1]] + i // 4 for i in range(8)]
    options = GREEDY | {"max_new_tokens": 32, "min_new_tokens": 32}
    want = [local.generate(p, **options)[0].tolist() for p in prompts]
    before = counters(swarm)
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda p: model.generate(p, **options)[0].tolist(), prompts))
    assert got == want
    assert all(
        after["shared_passes"] > earlier["shared_passes"]
        for after, earlier in zip(counters(swarm), before, strict=True)
    )


def test_beams_sampling_and_assisted_are_exact(
    swarm: LocalSwarm, local: Any, ids: torch.Tensor
) -> None:
    model = join(swarm)
    for options in (
        {"num_beams": 3},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
    ):
        options = GREEDY | {"max_new_tokens": 24, "min_new_tokens": 24} | options
        torch.manual_seed(7)
        want = local.generate(ids, **options)
        torch.manual_seed(7)
        assert model.generate(ids, **options).tolist() == want.tolist(), options


def test_killed_before_eight_positions(
    swarm: LocalSwarm, ids: torch.Tensor, expected: list[int]
) -> None:
    """SIGKILL of the server in use, each hop in turn; its replica was started meanwhile."""
    model = join(swarm)
    helper = ThreadPoolExecutor(1)
    spare = [helper.submit(swarm.add, SPANS[0])]
    with model.inference_session(max_length=128) as session:

        def kill(hop: int) -> None:
            spare.pop().result()
            swarm.kill(in_use(swarm, session, hop))
            spare.append(helper.submit(swarm.add, SPANS[(hop + 1) % 3]))

        positions = (1, 2, 9, 17, 30, 31, 47, 63)
        actions = {at: (lambda i=i: kill(i % 3)) for i, at in enumerate(positions)}
        streamer = AtToken(actions)
        got = model.generate(ids, streamer=streamer, **GREEDY)
        assert session.recoveries == len(positions)
    helper.shutdown()
    assert got[0].tolist() == expected


def test_killed_during_prefill_and_again_during_replay(
    swarm: LocalSwarm, local: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ids.repeat(1, 60)
    options: dict[str, Any] = GREEDY | {"max_new_tokens": 8, "min_new_tokens": 8}
    pieces = ("8:12", "12:16")
    added = [swarm.add(SPANS[1])]  # it is left for the pieces in the end only, as they are slow
    monkeypatch.setattr(swarm, "_server_args", [*swarm._server_args, "--throughput=1"])
    added += [swarm.add(span) for span in pieces]
    killed: list[str] = []
    on_output = RemoteSession.on_output

    def kill_who_answers_first(remote: RemoteSession, hop: Hop, output: Output) -> None:
        on_output(remote, hop, output)
        if str(hop.blocks) == SPANS[1] and hop.peer_id not in killed:
            assert hop.position < text.shape[1]
            killed.append(hop.peer_id)
            swarm.kill(next(s.index for s in swarm.servers if s.peer_id == hop.peer_id))

    monkeypatch.setattr(RemoteSession, "on_output", kill_who_answers_first)
    model = join(swarm, chunk_bytes=1 << 13)
    with model.inference_session(max_length=512) as session:
        got = model.generate(text, session=session, **options)
        assert [str(hop.blocks) for hop in session.hops] == [SPANS[0], *pieces, SPANS[2]]
    assert len(killed) == 2
    assert got.tolist() == local.generate(text, **options).tolist()
    monkeypatch.undo()
    for index in added[1:]:
        swarm.kill(index)
    swarm.add(SPANS[1])


def test_a_frozen_server_counts_as_dead(
    swarm: LocalSwarm, ids: torch.Tensor, expected: list[int]
) -> None:
    swarm.add(SPANS[1])
    model = join(swarm, step=1.5, sync=1.0)
    frozen: list[int] = []
    with model.inference_session(max_length=128) as session:

        def freeze() -> None:
            frozen.append(in_use(swarm, session, 1))
            swarm.freeze(frozen[0])

        got = model.generate(ids, streamer=AtToken({20: freeze}), **GREEDY)
        assert session.recoveries >= 1
        assert in_use(swarm, session, 1) != frozen[0]
    swarm.kill(frozen[0])
    assert got[0].tolist() == expected


def test_without_a_replacement_it_says_so_or_waits_for_one(
    swarm: LocalSwarm, ids: torch.Tensor, expected: list[int]
) -> None:
    """All who serve the last blocks die in the middle of two texts; one client waits for long."""
    hasty, patient = join(swarm, recovery=2.0), join(swarm, recovery=120.0)
    adding = threading.Thread(target=swarm.add, args=[SPANS[2]])
    with (
        hasty.inference_session(max_length=128) as short,
        patient.inference_session(max_length=128) as long,
    ):
        begun = hasty.generate(
            ids, session=short, **GREEDY | {"max_new_tokens": 9, "min_new_tokens": 9}
        )

        def kill_all() -> None:
            for server in swarm.servers:
                if server.alive and str(server.blocks) == SPANS[2]:
                    swarm.kill(server.index)
            began = time.monotonic()
            with pytest.raises(NoRoute, match="16:24") as caught:
                hasty.generate(None, session=short, **GREEDY)
            assert time.monotonic() - began < 30
            assert "\n" not in str(caught.value)
            adding.start()

        got = patient.generate(ids, session=long, streamer=AtToken({10: kill_all}), **GREEDY)
        assert long.recoveries == 1, long.log
        adding.join()
        assert got[0].tolist() == expected
        rest = hasty.generate(
            None, session=short, **GREEDY | {"max_new_tokens": 55, "min_new_tokens": 55}
        )
        assert [*begun[0].tolist(), *rest[0].tolist()] == expected
