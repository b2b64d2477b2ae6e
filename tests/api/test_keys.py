"""Keys open, limits hold, and nothing says what a key is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.api.keys import Budget, Caller, Grant, Keyring, read_grants
from swarm.errors import UsageError
from swarm.web import HttpProblem

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"


def test_a_key_opens_and_everything_else_does_not() -> None:
    ring = Keyring([Grant(key=ALICE), Grant(key=BOB)])
    assert ring.caller(f"Bearer {ALICE}", "1.2.3.4") is ring.caller(f"bearer {ALICE} ", "5.6.7.8")
    assert ring.caller(f"Bearer {ALICE}", "") is not ring.caller(f"Bearer {BOB}", "")
    for header in (
        "",
        "Bearer",
        "Bearer ",
        ALICE,
        f"Basic {ALICE}",
        f"Bearer {ALICE}x",
        "Bearer \udcff",
    ):
        with pytest.raises(HttpProblem) as caught:
            ring.caller(header, "1.2.3.4")
        assert caught.value.status == 401
        assert "sk-" not in str(caught.value)


def test_keys_are_not_kept() -> None:
    ring = Keyring([Grant(key=ALICE)])
    assert ALICE not in repr(ring._known)


def test_without_keys_people_are_known_by_address() -> None:
    ring = Keyring()
    assert ring.caller("Bearer whatever", "1.2.3.4") is ring.caller("", "1.2.3.4")
    assert ring.caller("", "1.2.3.4") is not ring.caller("", "1.2.3.5")
    for number in range(30_000):
        ring.caller("", str(number))
    assert len(ring._strangers) <= 10_000


def test_a_key_has_so_many_streams() -> None:
    caller = Caller(2, Budget(None, 0.0), streams=1)
    caller.check(1, 0.0)
    with pytest.raises(HttpProblem, match="2 streams at a time") as caught:
        caller.check(2, 0.0)
    assert (caught.value.status, caught.value.retry_after) == (429, 1.0)


def test_tokens_come_back_within_the_minute_and_debts_are_paid_first() -> None:
    budget = Budget(60, 0.0)
    assert budget.wait(0.0) == 0
    budget.take(90, 0.0)
    assert budget.wait(0.0) == pytest.approx(31)
    assert budget.wait(29.0) == pytest.approx(2)
    assert budget.wait(31.0) == 0
    assert Budget(None, 0.0).wait(0.0) == 0


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=20))
def test_nobody_gets_more_than_their_rate(steps: list[tuple[float, int]]) -> None:
    budget, now, taken = Budget(60, 0.0), 0.0, 0
    for pause, tokens in steps:
        now += pause
        if budget.wait(now) == 0:
            budget.take(tokens, now)
            taken += tokens
    assert taken <= 60 + now + 50  # a minute's worth, the rate, and the last one's debt


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[alice]\nkey = "{ALICE}"\nstreams = 4\ntokens_per_minute = 600\n')
    assert read_grants(path, [BOB]) == [
        Grant(key=ALICE, streams=4, tokens_per_minute=600),
        Grant(key=BOB),
    ]
    assert read_grants(None, []) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[alice", "no TOML"),
        ("", "no keys"),
        ("[alice]\nkey = 'short-secret'", "alice.key: string should have at least 16"),
        ("[alice]\nkey = 'sk-secret with spaces'", "alice.key"),
        (f"[alice]\nkey = '{ALICE}'\nstreams = 0", "alice.streams"),
        (f"[alice]\nkey = '{ALICE}'\nsterams = 1", "alice.sterams"),
        (f"[a]\nkey = '{ALICE}'\n[b]\nkey = '{ALICE}'", "same key"),
    ],
)
def test_what_is_wrong_with_it_is_said_without_the_keys(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        read_grants(path, [])
    assert "secret" not in str(caught.value)
    assert ALICE not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_grants(tmp_path / "none", [])
