"""What must hold in every simulated history: nothing is made up, lost, or served by the dead."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simulation.engine import Clock, Swarm
from simulation.measure import Measure
from simulation.run import RULES, figures, simulate, table
from simulation.session import State
from simulation.sessions import Sessions
from simulation.world import Leaving, Scenario, World, make_world, rtt
from swarm.dht.records import ServerState

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "simulate_swarm.py"
# Servers live for four minutes, so that much happens: half of the first are gone at the end.
ROUGH = Scenario(servers=25, clients=40, hours=0.1, seed=3, lifetime=240, warmup=60)


def check_books(swarm: Swarm, sessions: Sessions) -> None:
    """Each hop is one living server's, which knows of it, and has promised just that."""
    promised: Counter[int] = Counter()
    bulk: Counter[int] = Counter()
    for session in sessions.all:
        bulk.update(session.fed)
        for index, blocks in session.hops:
            server = swarm.servers[index]
            assert server.state is ServerState.ONLINE
            assert server.blocks.contains(blocks)
            assert session.client in server.sessions
            promised[index] += session.positions * len(blocks)
        if session.state in (State.DECODING, State.FEEDING):
            borders = [border for _, b in session.hops for border in (b.start, b.end)]
            assert borders == sorted(borders)
            assert (borders[0], borders[-1]) == (0, 80)
            assert borders[1:-1:2] == borders[2::2], "a gap, or an overlap"
    for server in swarm.servers:
        assert server.promised == promised[server.index]
        assert swarm.loads.bulk[server.index] == bulk[server.index]
    assert {session.client for session in sessions.all if session.state is State.DECODING} == set(
        np.flatnonzero(sessions.decoding).tolist()
    )


@pytest.mark.parametrize("rules", RULES)
def test_books_balance_and_nobody_is_served_by_the_dead(rules: str) -> None:
    world = make_world(ROUGH)
    clock, measure = Clock(), Measure(0.0)
    swarm = Swarm(world, RULES[rules], clock, measure)
    sessions = Sessions(world, swarm, clock, measure)
    swarm.begin()
    sessions.begin()
    while clock.now < ROUGH.end:
        clock.run_until(clock.now + 1)
        sessions.tick(1.0)
        if clock.now % 10 == 0:
            check_books(swarm, sessions)
    assert measure.counts["recoveries"] > 5
    # Every token was asked for, and every answer that ended is whole.
    asked = sum(
        turn.answer
        for session in sessions.all
        for chat, _ in zip(world.chats(session.client), range(20), strict=False)
        for turn in chat
    )
    assert 0 < measure.tokens < asked


@pytest.mark.parametrize("rules", RULES)
def test_the_same_seed_gives_the_same_figures(rules: str) -> None:
    short = replace(ROUGH, hours=0.05)
    one, two = (figures(world, simulate(world, RULES[rules])) for world in [make_world(short)] * 2)
    assert one == two
    other = make_world(replace(short, seed=4))
    assert figures(other, simulate(other, RULES[rules])) != one


def test_a_swarm_that_nobody_leaves_loses_nothing() -> None:
    scenario = Scenario(servers=60, clients=5, hours=0.1, lifetime=1e9, warmup=0.0, seed=1)
    world = make_world(scenario)
    assert all(machine.born == 0 for machine in world.machines)
    for name, make in RULES.items():
        got = figures(world, simulate(world, make))
        assert got["answers given up"] == got["blocked, % of waiting"] == 0, name
        assert got["moves per server-hour"] > 0 or got["recoveries per client-hour"] == 0, name
        assert got["throughput / bound, after loading"] <= 1
        assert got["answers"] > 5


def test_lifetimes_links_and_speeds_are_as_spread_as_said() -> None:
    world = make_world(Scenario(servers=5000, clients=10, hours=1))
    machines = world.machines
    for name in ("block_seconds", "up"):
        low, high = np.percentile([getattr(machine, name) for machine in machines], [1, 99])
        assert 60 < high / low < 130, name
    later = [machine.dies - machine.born for machine in machines if machine.born > 0]
    assert np.median(later) == pytest.approx(3600, rel=0.1)
    assert {machine.leaving for machine in machines} == set(Leaving)
    alive = [sum(m.born <= time < m.dies for m in machines) for time in (0, 1800, 3600)]
    assert alive == pytest.approx([5000] * 3, rel=0.05)  # steady churn
    trips = [rtt(world.clients[0], machine.place) for machine in machines]
    assert 0.002 < min(trips) < 0.06
    assert 0.1 < np.median(trips) < 0.25


def test_two_minutes_of_history_are_shared_by_all_rules(tmp_path: Path) -> None:
    """The script end to end: a table, the figures as JSON, a plot."""
    written, drawn = tmp_path / "run.json", tmp_path / "run.svg"
    command = [sys.executable, str(SCRIPT), "--servers", "10", "--clients", "3", "--minutes", "2"]
    done = subprocess.run(
        [*command, "--json", str(written), "--plot", str(drawn)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    runs = json.loads(written.read_text())["rules"]
    columns = {name: run["figures"] for name, run in runs.items()}
    assert done.stdout.strip() == table(columns).strip()
    assert list(columns) == ["ours", "petals"]
    again = subprocess.run(
        [*command, "--add", str(written)], capture_output=True, text=True, check=True, timeout=60
    )
    assert (again.stdout, again.stderr) == (done.stdout, "")
    other = subprocess.run(
        [*command, "--seed", "1", "--add", str(written)], capture_output=True, text=True
    )
    assert "another history" in other.stderr
    assert "minutes" in done.stderr
    assert drawn.read_text().startswith("<?xml")


def test_ctrl_c_ends_it_in_one_sentence() -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--servers",
        "50",
        "--clients",
        "20",
        "--minutes",
        "9e4",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        told = b""
        while b" of " not in told:
            told += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("wrong", [["--servers", "0"], ["--rules", "theirs"], ["--minutes", "nan"]])
def test_wrong_arguments_are_told_so(wrong: list[str]) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *wrong], capture_output=True, text=True)
    assert done.returncode == 2
    assert wrong[1] in done.stderr.splitlines()[-1]


def test_a_world_is_the_same_for_all_who_ask() -> None:
    world: World = make_world(ROUGH)
    assert world == make_world(ROUGH)
    chats = world.chats(2)
    assert [next(chats) for _ in range(5)] == [
        chat for chat, _ in zip(world.chats(2), range(5), strict=False)
    ]
