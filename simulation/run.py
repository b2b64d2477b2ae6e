"""One run from beginning to end, and what came of it as plain figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from simulation.engine import Clock, MakeRules, Swarm
from simulation.measure import Measure
from simulation.ours import OurRules
from simulation.petals import PetalsRules
from simulation.sessions import Sessions
from simulation.world import World

RULES: dict[str, MakeRules] = {"ours": OurRules, "petals": PetalsRules}
AUDIT = 60.0  # seconds


def simulate(
    world: World, make: MakeRules, progress: Callable[[float], None] = lambda now: None
) -> Measure:
    """Live through `world`; `progress` is told the simulated seconds, once a minute of them."""
    scenario = world.scenario
    clock, measure = Clock(), Measure(scenario.warmup)
    swarm = Swarm(world, make, clock, measure)
    sessions = Sessions(world, swarm, clock, measure)
    swarm.begin()
    sessions.begin()
    audit = 0.0
    while clock.now < scenario.end:
        clock.run_until(clock.now + scenario.tick)
        sessions.tick(scenario.tick)
        if clock.now >= audit:
            measure.audit(clock.now, swarm.servers, scenario.num_blocks)
            progress(clock.now)
            audit += AUDIT
    return measure


def figures(world: World, measure: Measure) -> dict[str, float]:
    """What the table shows; seconds, tokens per second, shares."""
    seconds = world.scenario.end - world.scenario.warmup
    counts, servers = measure.counts, world.scenario.servers
    hours = servers * seconds / 3600
    return {
        "throughput / bound, after loading": measure.mean("whole") / measure.mean("ready"),
        "throughput / bound, all present": measure.mean("whole") / measure.mean("present"),
        "with parts of spans / bound, after loading": measure.mean("parts") / measure.mean("ready"),
        "least throughput / bound": min(a.whole / a.ready for a in measure.audits),
        "tokens/s of all clients": measure.tokens / seconds,
        "step p50, ms": 1e3 * measure.steps.percentile(0.5),
        "step p99, ms": 1e3 * measure.steps.percentile(0.99),
        "step p50 with recoveries, ms": 1e3 * measure.all_steps.percentile(0.5),
        "step p99 with recoveries, ms": 1e3 * measure.all_steps.percentile(0.99),
        "first token p50, s": measure.first_tokens.percentile(0.5),
        "first token p99, s": measure.first_tokens.percentile(0.99),
        "recoveries per client-hour": counts["recoveries"]
        / world.scenario.clients
        / seconds
        * 3600,
        "recovery p50, s": measure.pauses.percentile(0.5),
        "recovery p99, s": measure.pauses.percentile(0.99),
        "blocked, % of waiting": 100 * measure.blocked / max(measure.wanting, 1.0),
        "answers": counts["answers"],
        "answers given up": counts["given up"],
        "openings refused as full, %": 100 * counts["refused as full"] / max(1, counts["openings"]),
        "routes left for better ones, % of answers": 100
        * counts["routes left for better ones"]
        / max(1, counts["answers"]),
        "moves per server-hour": counts["moves"] / hours,
        "announcements per server-minute": counts["announcements"] / hours / 60,
        "looks per server-minute": counts["looks of servers"] / hours / 60,
        "looks per client-minute": counts["looks of clients"]
        / world.scenario.clients
        / seconds
        * 60,
    }


Curves = Mapping[str, Sequence[Sequence[float]]]
"""By name, the points (x, y) of what is plotted."""


def curves(world: World, measure: Measure) -> Curves:
    begin, servers = world.scenario.warmup, world.scenario.servers
    moves = sorted(move for move in measure.moves if move > begin)
    counts = measure.all_steps.counts
    longer = 1 - counts.cumsum() / max(counts.sum(), 1)
    shown = [place for place in range(len(counts)) if 0 < longer[place] < 1]
    return {
        "throughput": [((a.time - begin) / 60, a.whole / a.ready) for a in measure.audits],
        "steps": [(float(measure.all_steps.edges[place]), float(longer[place])) for place in shown],
        "moves": [
            (0.0, 0.0),
            *(((when - begin) / 60, (n + 1) / servers) for n, when in enumerate(moves)),
            ((world.scenario.end - begin) / 60, len(moves) / servers),
        ],
    }


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """A row per figure, a column per set of rules."""
    names = list(next(iter(columns.values())))
    wide = max(map(len, names))
    lines = [" " * wide + "".join(f"{name:>12}" for name in columns)]
    for name in names:
        values = "".join(f"{_short(column[name]):>12}" for column in columns.values())
        lines.append(f"{name:<{wide}}{values}")
    return "\n".join(lines)


def _short(value: float) -> str:
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
