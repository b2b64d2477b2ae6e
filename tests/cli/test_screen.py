"""Whatever strangers call themselves, a terminal shows it as text and nothing else."""

from __future__ import annotations

import unicodedata
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.cli import main
from swarm.cli.screen import bar, plain
from swarm.errors import SwarmError

EVIL = [
    "\x1b[2J\x1b[H",  # clears the screen
    "\x1b]0;title\x07",  # renames the window
    "\x1b]52;c;ZXZpbA==\x07",  # writes into the clipboard
    "\x9b31m",  # the same as ESC [, in one character
    "\r\nroot@host# ",
    "abc\u202ecba\u202c",  # right to left
    "\u2066\u2067\u2068\u2069\u200e\u200f\u061c",
    "\u200b\u200c\u200d\ufeff\u2060\u00ad",  # invisible
    "\ud800",  # half of a pair
    "\U000e0041\U000e0042",  # tags
    "a\u2028b\u2029c\u0085d",
    "\x00\x07\x08\x7f",
]


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_what_is_not_seen_or_moves_things_is_replaced(evil: str) -> None:
    shown = plain(evil)
    assert len(shown) <= len(evil)
    assert all(c == " " or unicodedata.category(c)[0] in "LMNPS" for c in shown)


@given(st.text(), st.integers(1, 50))
def test_nothing_gets_through(text: str, most: int) -> None:
    shown = plain(text, most)
    assert len(shown) <= most + 1
    assert all(c == " " or unicodedata.category(c)[0] in "LMNPS" for c in shown)
    assert plain(shown, most + 1) == shown, "what is harmless stays"


@pytest.mark.parametrize(
    "name", ["Ada", "José", "東京の箱", "Ünïcödé", "בית", "نور", "हिन्दी", "👍 ok"]
)
def test_people_keep_their_names(name: str) -> None:
    assert plain(name) == name


def test_long_texts_end() -> None:
    assert plain("x" * 10_000) == "x" * 200 + "…"
    assert plain("z" + "\u0301" * 10_000) == "z\u0301\u0301…"


def test_lines_are_kept_where_they_are_wanted() -> None:
    assert plain("a\n\tb\x1b[1m\r", lines=True) == "a\n\tb\ufffd[1m\ufffd"
    assert plain("a\nb") == "a\ufffdb"


@given(st.floats(-1, 2), st.integers(1, 40))
def test_a_bar_is_as_wide_as_it_should_be(share: float, width: int) -> None:
    drawn = bar(share, width)
    assert len(drawn) == width
    assert abs(drawn.count("█") - min(max(share, 0), 1) * width) <= 1


def test_bars() -> None:
    assert (bar(0, 4), bar(0.5, 4), bar(1, 4), bar(0.03125, 4)) == ("    ", "██  ", "████", "▏   ")


def test_what_a_server_answers_reaches_the_screen_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> int:
        raise SwarmError("refused: \x1b[2J\u202eyou [busy]")

    monkeypatch.setattr(import_module("swarm.cli.main"), "dispatch", refuse)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "swarm: refused: \ufffd[2J\ufffdyou [busy]\n"
