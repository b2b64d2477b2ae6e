"""The last day is remembered minute by minute, within bounds."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.monitor.history import COLUMNS, DAY, History, Minute, Served, contributors, squeeze, thin
from swarm.monitor.roster import Event, Kind

NOW = 1_800_000_000 // 60 * 60.0


def test_looks_of_a_minute_become_one_that_keeps_the_worst() -> None:
    history = History()
    history.look(NOW, 30.0, [2, 2], [("a", "Ada", 2), ("b", "", 2)])
    history.look(NOW + 20, 0.0, [2, 0], [("a", "Ada", 2)])
    history.look(NOW + 60, 10.0, [1, 1], [("a", "Ada", 2)])
    assert [(m.at, m.tokens, m.servers, m.low) for m in history.minutes] == [
        (NOW, 15.0, 1, bytes([2, 0])),
        (NOW + 60, 10.0, 1, bytes([1, 1])),
    ]


def test_block_hours_count_the_time_that_was_watched() -> None:
    history = History()
    for second in range(0, 3601, 60):
        history.look(NOW + second, 1.0, [1] * 8, [("a", "Ada", 8)])
    assert history.served["a"].block_seconds == 8 * 3600
    history.look(NOW + 90_000, 1.0, [1] * 8, [("a", "Ada", 8)])  # nobody watched for a day
    assert history.served["a"].block_seconds == 8 * 3600


def test_a_day_is_kept_and_no_more() -> None:
    history = History()
    history.events.append(Event(NOW, Kind.JOINED, "a", "", (0, 8)))
    for minute in range(2000):
        history.look(NOW + 60 * minute, 1.0, [1], [(f"peer {minute}", "", 1)])
    assert len(history.minutes) == DAY / 60
    assert not history.events
    assert len(history.served) == 2000
    history.look(NOW + 60 * 2000, 1.0, [1], [("one more", "", 1)])
    assert "peer 0" not in history.served
    assert "one more" in history.served
    history.prune(NOW + 33 * DAY)
    assert not history.served


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=4096))
def test_many_blocks_are_squeezed_into_few_columns_of_which_none_hides_a_hole(
    replicas: list[int],
) -> None:
    low = squeeze(replicas)
    assert 0 < len(low) <= COLUMNS
    assert (0 in low) == (0 in replicas)
    assert min(low) == min(255, *replicas)


def test_a_day_is_told_in_few_steps_with_gaps_where_nobody_looked() -> None:
    minutes = [Minute(int(NOW) + 60 * i, float(i), 3, b"\x02") for i in range(1440) if i % 100 > 10]
    minutes[700].low = b"\x00"
    told = thin(minutes, NOW + 1440 * 60)
    assert len(told["steps"]) <= 288
    assert told["start"] == minutes[0].at
    assert None in told["steps"]
    assert sum(step is not None and step[2] == "00" for step in told["steps"]) == 1
    assert thin([], NOW)["steps"] == []
    few = thin(minutes[:3], minutes[2].at)
    assert few["step"] == 60
    assert [step[0] for step in few["steps"]] == [11.0, 12.0, 13.0]


def test_servers_of_one_name_contribute_together_and_those_without_apart() -> None:
    served = {
        "a": Served("Ada", 3600.0, NOW, NOW),
        "b": Served("Ada", 7200.0, NOW, NOW + 5),
        "c": Served("", 36_000.0, NOW, NOW),
        "d": Served("", 360.0, NOW, NOW),
    }
    told = contributors(served, most=3)
    assert [(one["name"], one["hours"], one["servers"]) for one in told] == [
        ("", 10.0, 1),
        ("Ada", 3.0, 2),
        ("", 0.1, 1),
    ]
    assert told[1]["last"] == NOW + 5
