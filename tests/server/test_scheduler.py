"""Passes keep to their budget, decode goes first, nobody starves, and clients share alike."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from swarm.server.scheduler import PATIENCE, Scheduler, Slice, Waiting

BUDGET = 64
STEPS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(1, 40),
        st.sampled_from([0, 1, 1, 1, 7, 90]),
        st.booleans(),
        st.sampled_from([0, 4, 5, 5, 9]),
    ),
    max_size=20,
)


def scheduler_with(*steps: Waiting) -> Scheduler:
    scheduler = Scheduler(BUDGET)
    for step in steps:
        scheduler.add(step)
    return scheduler


def drain(scheduler: Scheduler, now: float = 0.0) -> list[list[Slice]]:
    passes: list[list[Slice]] = []
    while len(scheduler):
        passes.append(scheduler.next_pass(now))
        assert passes[-1], "something waits, and nothing is run"
    return passes


@given(STEPS, st.data())
def test_every_step_is_run_once_in_order_and_within_the_budget(
    asked: list[tuple[str, int, int, bool, int]], data: st.DataObject
) -> None:
    """Against the naive model: what has been added, and how far each step is."""
    scheduler, now = Scheduler(BUDGET), 0.0
    steps = {key: Waiting(key, *fields, session=key) for key, fields in enumerate(asked)}
    arriving, done = list(steps.values()), Counter[int]()
    finished: list[int] = []
    while arriving or len(scheduler):
        for _ in range(data.draw(st.integers(0 if len(scheduler) else 1, 4))):
            if arriving:
                scheduler.add(arriving.pop(0))
        while wait := scheduler.hold(now):
            now += max(wait, 1e-6)
        slices = scheduler.next_pass(now)
        assert slices, "something waits, nothing holds it back, and nothing is run"
        assert len({piece.key for piece in slices}) == len(slices)
        sizes = [steps[piece.key].rows * (piece.end - piece.begin) for piece in slices]
        # Beyond the budget only by steps that advance by one token per row, or cannot be cut.
        exempt = [
            size
            for size, piece in zip(sizes, slices, strict=True)
            if piece.end - piece.begin <= 1 or steps[piece.key].whole
        ]
        assert sum(sizes) <= BUDGET + sum(sorted(exempt)[-3:])
        for piece in slices:
            step = steps[piece.key]
            assert piece.begin == done[piece.key]
            assert piece.end > piece.begin or step.tokens == 0
            assert piece.last == (piece.end == step.tokens)
            assert piece.last or not step.whole
            done[piece.key] = piece.end
            if piece.last:
                finished.append(piece.key)
        begin, now = now, now + data.draw(st.sampled_from([0.0, 0.001, 0.1, 5.0]))
        scheduler.passed(begin, now)
    assert sorted(finished) == sorted(steps)
    kinds = {(step.client, step.priority, step.tokens <= 1) for step in steps.values()}
    for kind in kinds:  # in the order in which they came, each kind for itself
        mine = [
            key
            for key, step in ((key, steps[key]) for key in finished)
            if (step.client, step.priority, step.tokens <= 1) == kind
        ]
        assert mine == sorted(mine)


def test_decode_goes_before_prefill_and_leaves_it_a_quarter() -> None:
    prefill = Waiting(0, "long", 1, 1000)
    scheduler = scheduler_with(prefill, *(Waiting(key, "chat", 1, 1) for key in range(1, 101)))
    first = scheduler.next_pass(0.0)
    assert [piece.key for piece in first[:-1]] == list(range(1, 49))
    assert first[-1].key == 0
    second = scheduler.next_pass(0.0)
    assert [piece.key for piece in second[:-1]] == list(range(49, 97))
    assert second[-1].key == 0
    assert len(scheduler.next_pass(0.0)) == 5


def test_prefill_alone_fills_the_pass_once_streams_are_quiet() -> None:
    scheduler = scheduler_with(Waiting(0, "chat", 1, 1))
    scheduler.next_pass(0.0)
    scheduler.add(Waiting(1, "long", 1, 1000))
    assert scheduler.next_pass(100.0) == [Slice(1, 0, BUDGET, last=False)]


def test_a_prompt_is_not_held_back_by_a_stream_that_has_just_ended() -> None:
    """Its steps came every 10 ms; 50 ms after the last one nobody waits for it any more."""
    scheduler, now = Scheduler(BUDGET), 0.0
    for key in range(30):
        scheduler.add(Waiting(key, "chat", 1, 1, session=7))
        scheduler.next_pass(now)
        scheduler.passed(now, now + 0.002)
        now += 0.010
    scheduler.add(Waiting(99, "chat", 1, 1000, session=8))
    assert scheduler.next_pass(now)[0].end < BUDGET
    piece = scheduler.next_pass(now + 0.060)[0]
    assert piece.end - piece.begin == BUDGET


def test_while_streams_decode_a_pass_takes_no_more_prefill_than_its_time_allows() -> None:
    """A stream's pass takes 10 ms and a prefilled token 1 ms: about twice 10 tokens each time. Then
    bulk work rests as long as that pass took: others use the processor meanwhile."""
    scheduler, now = Scheduler(512), 0.0
    scheduler.add(Waiting(0, "long", 1, 4000))
    passes: list[tuple[float, float, int]] = []
    for key in range(1, 200):
        if key % 3:  # in between the stream is elsewhere
            scheduler.add(Waiting(key, "chat", 1, 1, session=7))
        now += scheduler.hold(now)
        slices = scheduler.next_pass(now)
        taken = sum(piece.end - piece.begin for piece in slices if piece.key == 0)
        begin, now = now, now + 0.010 + 0.001 * taken
        scheduler.passed(begin, now)
        passes.append((begin, now, taken))
    bulk = [(begin, end, taken) for begin, end, taken in passes[20:] if taken]
    assert all(10 <= taken <= 24 for _, _, taken in bulk)
    for (begin, end, _), (after, _, _) in pairwise(bulk):
        assert after - end >= 0.99 * (end - begin)
    assert scheduler.hold(now + 1) == 0, "nobody decodes any more"


def test_prefill_advances_under_a_constant_stream_of_decodes() -> None:
    scheduler, keys = scheduler_with(Waiting(0, "long", 4, 40)), iter(range(1, 1 << 30))
    done = False
    for _ in range(200):
        for _ in range(BUDGET):
            scheduler.add(Waiting(next(keys), "chat", 1, 1))
        done |= any(piece.key == 0 and piece.last for piece in scheduler.next_pass(0.0))
    assert done, "the prefill starved"


def test_a_client_with_many_prompts_does_not_hold_up_another() -> None:
    greedy = [Waiting(key, "greedy", 1, 640) for key in range(8)]
    scheduler = scheduler_with(*greedy, Waiting(99, "modest", 1, 640))
    tokens: Counter[str] = Counter()
    for pieces in drain(scheduler)[:20]:
        for piece in pieces:
            tokens["modest" if piece.key == 99 else "greedy"] += piece.end - piece.begin
    assert abs(tokens["modest"] - tokens["greedy"]) <= BUDGET


def test_a_client_with_many_streams_does_not_hold_up_another() -> None:
    """More decode steps than a pass has room for: each client gets the same share of it."""
    scheduler, keys = Scheduler(BUDGET), iter(range(1 << 30))
    waits: list[int] = []
    waited = 0
    for key in range(300):
        scheduler.add(Waiting(next(keys), "greedy", 1, 1, session=key))
    mine = next(keys)
    scheduler.add(Waiting(mine, "modest", 1, 1, session=-1))
    for _ in range(50):
        for piece in scheduler.next_pass(0.0):
            if piece.key == mine:
                waits.append(waited)
                waited, mine = 0, next(keys)
                scheduler.add(Waiting(mine, "modest", 1, 1, session=-1))
            else:
                scheduler.add(Waiting(next(keys), "greedy", 1, 1))
        waited += 1
    assert max(waits) <= 1
    assert len(waits) >= 50


def test_lower_priorities_take_what_is_left_and_never_starve() -> None:
    """Interactive streams fill every pass; each lower class still has its turn, in bounded time."""
    scheduler, keys = Scheduler(BUDGET), iter(range(100, 1 << 30))
    low = {0: (4, 90), 1: (4, 1), 2: (0, 90), 3: (0, 1)}
    for key, (priority, tokens) in low.items():
        scheduler.add(Waiting(key, "batch", 1, tokens, priority=priority))
    seen: dict[int, int] = {}
    for number in range(PATIENCE + 21):
        for _ in range(2 * BUDGET):
            scheduler.add(Waiting(next(keys), "chat", 1, 1))
        slices = scheduler.next_pass(0.0)
        served = [piece.key for piece in slices if piece.key in low]
        assert not served or number >= PATIENCE
        assert len(slices) > BUDGET // 2
        seen.update((key, number) for key in served)
    assert set(seen) == set(low)


def test_without_interactive_work_lower_priorities_have_it_all() -> None:
    scheduler = scheduler_with(*(Waiting(key, "batch", 1, 1, priority=1) for key in range(BUDGET)))
    assert len(scheduler.next_pass(0.0)) == BUDGET


def test_a_step_wider_than_the_budget_still_advances() -> None:
    passes = drain(scheduler_with(Waiting(0, "wide", 1000, 3), Waiting(1, "wide", 1000, 1)))
    assert [(p.key, p.begin, p.end) for pieces in passes for p in pieces if p.key == 0] == [
        (0, 0, 1),
        (0, 1, 2),
        (0, 2, 3),
    ]


def test_a_step_that_waited_for_pages_goes_on_where_it_was() -> None:
    scheduler = scheduler_with(Waiting(0, "long", 1, 100))
    assert scheduler.next_pass(0.0) == [Slice(0, 0, 64, last=False)]
    scheduler.drop(0)
    assert not len(scheduler)
    scheduler.add(Waiting(0, "long", 1, 100, begin=64))
    assert scheduler.next_pass(0.0) == [Slice(0, 64, 100, last=True)]


@given(STEPS, st.sets(st.integers(0, 19)), st.integers(0, 3))
def test_what_is_dropped_is_never_run(
    asked: list[tuple[str, int, int, bool, int]], dropped: set[int], passes: int
) -> None:
    scheduler = scheduler_with(*(Waiting(key, *fields) for key, fields in enumerate(asked)))
    done = [piece.key for _ in range(passes) for piece in scheduler.next_pass(0.0) if piece.last]
    for key in dropped:
        scheduler.drop(key)
    later = [piece for pieces in drain(scheduler) for piece in pieces]
    assert not dropped & {piece.key for piece in later}
    finished = done + [piece.key for piece in later if piece.last]
    assert set(finished) | dropped >= set(range(len(asked)))
