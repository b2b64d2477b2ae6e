"""Text comes whole: no half characters, nothing of a stop string, every token told once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.api.text import Detokenizer, Stopper, Told
from tests.api.site import tokenizer

TEXTS = [
    "In the beginning, it was.\n\n  And",
    "naïve café — 🐝🐝 日本語 \u202eabc",
    "a  b   c\t\td",
]


def decode(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text_and_none_ends_in_half_a_character(text: str) -> None:
    ids = tokenizer()(text, add_special_tokens=False).input_ids
    slow = Detokenizer(lambda some: decode(list(some)))
    pieces = [slow.add(token) for token in ids] + [slow.end()]
    assert "".join(pieces) == decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(ids) / 5


@given(st.lists(st.integers(0, 4000), max_size=60))
def test_any_tokens_at_all_come_out_without_piling_up(ids: list[int]) -> None:
    slow = Detokenizer(lambda some: decode(list(some)))
    for token in ids:
        slow.add(token)
        assert len(slow._ids) < 20
    slow.end()


WORDS = st.lists(st.text("ab|", min_size=0, max_size=3), max_size=12)


@given(WORDS, st.lists(st.text("ab|", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_and_is_never_shown(words: list[str], stops: list[str]) -> None:
    stopper, shown, told = Stopper(stops), "", list[Told]()
    fed = 0
    for index, word in enumerate(words):
        stopper.tell(Told(index, 0.0, (), stopper.end))
        out, tokens = stopper.add(word)
        fed, shown = fed + 1, shown + out
        told += tokens
        if stopper.stopped:
            break
    else:
        out, tokens = stopper.add("", last=True)
        shown += out
        told += tokens
    text = "".join(words[:fed])
    found = [at for at in map(text.find, stops) if at >= 0]
    assert stopper.stopped == bool(found)
    assert shown == (text[: min(found)] if found else text)
    assert [token.id for token in told] == list(range(len(told)))
    if not found:
        assert len(told) == len(words)
    assert all(token.offset <= len(shown) for token in told)


def test_text_that_cannot_be_a_stop_string_is_shown_at_once() -> None:
    stopper = Stopper(["</s>", "User:"])
    assert stopper.add("Hello")[0] == "Hello"
    assert stopper.add(" <")[0] == " "
    assert stopper.add("b")[0] == "<b"
    assert stopper.add(" Us")[0] == " "
    assert stopper.add("er: me")[0] == ""
    assert stopper.stopped
