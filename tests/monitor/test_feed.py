"""Readers get the state once, then only what changes, and end with the same state."""

import asyncio
import gzip
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from swarm.monitor.feed import Feed, difference

KEYS = st.sampled_from("abcd")
LEAVES = st.one_of(st.integers(0, 2), st.text(max_size=2), st.lists(st.integers(0, 2), max_size=2))
STATES = st.recursive(
    st.dictionaries(KEYS, LEAVES, max_size=4),
    lambda inner: st.dictionaries(KEYS, st.one_of(LEAVES, inner), max_size=4),
    max_leaves=20,
)


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


@given(STATES, STATES)
def test_a_patch_makes_the_one_of_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    patch = difference(before, after)
    assert merged(before, patch) == after
    assert (patch == {}) == (before == after)


async def read(feed: Feed, run: str, number: int, events: int) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    stream = feed.follow(run, number)
    async for piece in stream:
        name, data = piece.decode().split("\n")[:2]
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        if len(found) == events:
            break
    await stream.aclose()
    return found


def test_a_reader_gets_what_it_missed_and_what_comes() -> None:
    async def story() -> None:
        feed = Feed({"at": 0})
        feed.publish({"at": 1})
        feed.publish({"at": 1})  # nothing new is no news
        reading = asyncio.create_task(read(feed, feed.run, 0, 2))
        await asyncio.sleep(0.01)
        assert feed.readers == 1
        feed.publish({"at": 2, "more": {"x": 1}})
        assert await reading == [
            ("patch", {"number": 1, "patch": {"at": 1}}),
            ("patch", {"number": 2, "patch": {"at": 2, "more": {"x": 1}}}),
        ]
        assert feed.readers == 0

    asyncio.run(story())


def test_who_cannot_follow_is_told_to_begin_anew() -> None:
    async def story() -> None:
        feed = Feed({"at": 0})
        for at in range(1, 200):
            feed.publish({"at": at})
        for run, number in ((feed.run, 0), (feed.run, 999), ("another", 199)):
            assert await read(feed, run, number, 9) == [("reset", {})]

    asyncio.run(story())


def test_the_whole_state_says_where_to_go_on() -> None:
    feed = Feed({"at": 0})
    feed.publish({"at": 5})
    plain, small = feed.whole(compressed=False), feed.whole(compressed=True)
    assert json.loads(plain) == {"run": feed.run, "number": 1, "at": 5}
    assert gzip.decompress(small) == plain
    assert feed.whole(compressed=True) is small
    feed.publish({"at": 6})
    assert json.loads(feed.whole(compressed=False))["at"] == 6
