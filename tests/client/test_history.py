"""Histories hold what naive lists would hold, whatever beams and rollbacks do to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.history import History, InputHistory
from swarm.errors import LocalProtocolError

BATCH = 3
ROWS = st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 5), st.integers(0, 70)),
        st.tuples(st.just("crop"), st.integers(0, 200)),
        st.tuples(st.just("reorder"), ROWS),
    ),
    max_size=12,
)


def numbered(start: int, tokens: int, serial: int) -> torch.Tensor:
    """[BATCH, tokens, 2]: every row, position and append has a value of its own."""
    rows = torch.arange(BATCH).view(-1, 1, 1) * 1e6
    positions = torch.arange(start, start + tokens).view(1, -1, 1) * 1e2
    return (rows + positions + serial).expand(BATCH, tokens, 2).clone()


@given(operations=OPERATIONS, base=st.integers(0, 4), begin=st.integers(0, 80))
def test_a_history_is_a_list_of_columns(operations: list[Any], base: int, begin: int) -> None:
    history = History(base)
    columns: list[torch.Tensor] = []  # [BATCH, 2] each, from position `base` on
    for serial, (name, *arguments) in enumerate(operations):
        match name:
            case "append":
                overlap, tokens = arguments
                start = max(base, history.length - overlap)
                new = numbered(start, tokens, serial)
                history.append(start, new)
                columns += list(new.unbind(1))[base + len(columns) - start :]
            case "crop":
                length = max(base, arguments[0])
                history.crop(length)
                del columns[length - base :]
            case _:
                history.reorder(arguments[0])
                columns = [column[arguments[0]] for column in columns]
        assert history.length == base + len(columns)
    if columns:
        begin = min(begin, len(columns) - 1)
        expected = torch.stack(columns[begin:], dim=1)
        assert torch.equal(history.read(base + begin, history.length), expected)


def test_reading_or_writing_beyond_the_end_is_our_defect() -> None:
    history = History()
    history.append(0, numbered(0, 4, 0))
    with pytest.raises(LocalProtocolError, match="4 positions"):
        history.append(5, numbered(5, 1, 0))
    with pytest.raises(LocalProtocolError):
        history.read(2, 5)


def test_it_grows_without_copying_at_every_step() -> None:
    history = History()
    sizes: set[int] = set()
    for position in range(1000):
        history.append(position, torch.zeros(1, 1, 8))
        sizes.add(history.nbytes)
    assert len(sizes) <= 5
    assert history.nbytes <= 2 * 1024 * 8 * 4


@given(given_at=st.sets(st.integers(0, 4)), reorder=ROWS, crop=st.integers(0, 15))
def test_inputs_that_stay_away_are_what_servers_would_assume(
    given_at: set[int], reorder: list[int], crop: int
) -> None:
    history, tokens = InputHistory(BATCH), 3
    positions = torch.zeros(BATCH, 0, dtype=torch.long)
    padding = torch.zeros(BATCH, 0, dtype=torch.bool)
    for index in range(5):
        start = index * tokens
        counted = torch.arange(start, start + tokens).expand(BATCH, tokens)
        real = torch.ones(BATCH, tokens, dtype=torch.bool)
        if index in given_at:
            counted = counted + torch.arange(BATCH).view(-1, 1)
            real = torch.arange(BATCH).view(-1, 1) <= torch.arange(tokens)
            history.append(start, tokens, {"position_ids": counted, "padding": real})
        else:
            history.append(start, tokens, {})
        positions, padding = torch.cat([positions, counted], 1), torch.cat([padding, real], 1)
    history.crop(crop)
    history.reorder(reorder)
    kept = history.read(0, crop)
    assert set(kept) == ({"position_ids", "padding"} if given_at else set())
    if given_at:
        assert torch.equal(kept["position_ids"], positions[reorder, :crop])
        assert torch.equal(kept["padding"], padding[reorder, :crop])


def test_positions_of_several_planes_are_kept() -> None:
    history = InputHistory(BATCH)
    history.append(0, 2, {})
    planes = torch.arange(BATCH * 2 * 3).view(BATCH, 2, 3)
    history.append(2, 2, {"position_ids": planes})
    kept = history.read(0, 4)["position_ids"]
    assert torch.equal(kept[:, 2:], planes)
    assert kept[0, :2].tolist() == [[0, 0, 0], [1, 1, 1]]
