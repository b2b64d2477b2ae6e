"""Strangers' words on a terminal, made harmless; and bars."""

from __future__ import annotations

import unicodedata

MOST = 200
"""Characters that are shown of one text, unless somebody says otherwise."""

_LETTERS = {"L", "N", "P", "S"}  # what is seen by itself; see unicodedata.category
_MOST_MARKS = 2  # on one letter, as in many a language: towers of them reach into other lines
_IN_TEXTS = "\n\t\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def plain(text: str, most: int = MOST, *, lines: bool = False) -> str:
    """What may be shown of a text that a stranger wrote: no escape sequences, nothing that turns
    the direction of writing, nothing invisible, no towers of accents, at most `most` characters.

    With `lines` tabs, line breaks, and what joins letters and pictures stay as they are.
    """
    shown: list[str] = []
    marks = 0
    for character in text[: most + 1]:
        kind = unicodedata.category(character)[0]
        marks = marks + 1 if kind == "M" else 0
        if kind in _LETTERS or character == " " or (lines and character in _IN_TEXTS):
            shown.append(character)
        elif kind == "M":
            shown.append(character if marks <= _MOST_MARKS else "")
        else:
            shown.append("\N{REPLACEMENT CHARACTER}")
    if len(text) > most:
        shown[most:] = "\N{HORIZONTAL ELLIPSIS}"
    return "".join(shown)


def bar(share: float, width: int) -> str:
    """`share` of `width` columns, to an eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(width)
