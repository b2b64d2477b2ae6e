"""Passes keep to their budget, decode goes first, nobody starves, and clients share alike."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from swarm.server.scheduler import Scheduler, Slice, Waiting

BUDGET = 64
STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.sampled_from([0, 1, 1, 1, 7, 90])),
    max_size=20,
)


def scheduler_with(*steps: Waiting) -> Scheduler:
    scheduler = Scheduler(BUDGET)
    for step in steps:
        scheduler.add(step)
    return scheduler


def drain(scheduler: Scheduler) -> list[list[Slice]]:
    passes: list[list[Slice]] = []
    while len(scheduler):
        passes.append(scheduler.next_pass())
        assert passes[-1], "something waits, and nothing is run"
    return passes


@given(STEPS, st.data())
def test_every_step_is_run_once_in_order_and_within_the_budget(
    asked: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    scheduler = Scheduler(BUDGET)
    steps = {key: Waiting(key, *fields) for key, fields in enumerate(asked)}
    arriving, done = list(steps.values()), Counter[int]()
    finished: list[int] = []
    while arriving or len(scheduler):
        for _ in range(data.draw(st.integers(0 if len(scheduler) else 1, 4))):
            if arriving:
                scheduler.add(arriving.pop(0))
        slices = scheduler.next_pass()
        assert slices
        assert len({piece.key for piece in slices}) == len(slices)
        sizes = [steps[piece.key].rows * (piece.end - piece.begin) for piece in slices]
        # Beyond the budget only by steps that advance by one token per row.
        narrow = [s for s, piece in zip(sizes, slices, strict=True) if piece.end - piece.begin <= 1]
        assert sum(sizes) <= BUDGET + sum(sorted(narrow)[-2:])
        for piece in slices:
            step = steps[piece.key]
            assert piece.begin == done[piece.key]
            assert piece.end > piece.begin or step.tokens == 0
            assert piece.last == (piece.end == step.tokens)
            done[piece.key] = piece.end
            if piece.last:
                finished.append(piece.key)
    assert sorted(finished) == sorted(steps)
    for client in "abc":  # in the order in which they came, each kind for itself
        for decode in (True, False):
            mine = [k for k in finished if steps[k].client == client]
            mine = [k for k in mine if (steps[k].tokens <= 1) == decode]
            assert mine == sorted(mine)


def test_decode_goes_before_prefill_and_leaves_it_a_quarter() -> None:
    prefill = Waiting(0, "long", 1, 1000)
    scheduler = scheduler_with(prefill, *(Waiting(key, "chat", 1, 1) for key in range(1, 101)))
    first = scheduler.next_pass()
    assert [piece.key for piece in first[:-1]] == list(range(1, 49))
    assert first[-1] == Slice(0, 0, 16, last=False)
    second = scheduler.next_pass()
    assert [piece.key for piece in second[:-1]] == list(range(49, 97))
    assert second[-1] == Slice(0, 16, 32, last=False)
    assert len(scheduler.next_pass()) == 5  # what is left, and all the rest for the prefill


def test_prefill_advances_under_a_constant_stream_of_decodes() -> None:
    scheduler = scheduler_with(Waiting(0, "long", 4, 40))
    for round_ in range(200):
        for number in range(BUDGET):
            scheduler.add(Waiting(1 + round_ * BUDGET + number, "chat", 1, 1))
        if any(piece.key == 0 and piece.last for piece in scheduler.next_pass()):
            return
    raise AssertionError("the prefill starved")


def test_a_client_with_many_prompts_does_not_hold_up_another() -> None:
    greedy = [Waiting(key, "greedy", 1, 640) for key in range(8)]
    scheduler = scheduler_with(*greedy, Waiting(99, "modest", 1, 640))
    tokens: Counter[str] = Counter()
    for pieces in drain(scheduler)[:20]:
        for piece in pieces:
            tokens["modest" if piece.key == 99 else "greedy"] += piece.end - piece.begin
    assert abs(tokens["modest"] - tokens["greedy"]) <= BUDGET


def test_a_step_wider_than_the_budget_still_advances() -> None:
    passes = drain(scheduler_with(Waiting(0, "wide", 1000, 3), Waiting(1, "wide", 1000, 1)))
    assert [(p.key, p.begin, p.end) for pieces in passes for p in pieces if p.key == 0] == [
        (0, 0, 1),
        (0, 1, 2),
        (0, 2, 3),
    ]


@given(STEPS, st.sets(st.integers(0, 19)), st.integers(0, 3))
def test_what_is_dropped_is_never_run(
    asked: list[tuple[str, int, int]], dropped: set[int], passes: int
) -> None:
    scheduler = scheduler_with(*(Waiting(key, *fields) for key, fields in enumerate(asked)))
    done = [piece.key for _ in range(passes) for piece in scheduler.next_pass() if piece.last]
    for key in dropped:
        scheduler.drop(key)
    later = [piece for pieces in drain(scheduler) for piece in pieces]
    assert not dropped & {piece.key for piece in later}
    finished = done + [piece.key for piece in later if piece.last]
    assert set(finished) | dropped >= set(range(len(asked)))
