r"""Tokens, numbers and texts as a person sees them: the same in HTML, in figures and in text.

>>> visible(" Paris\n")
'·Paris⏎'
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby, zip_longest

__all__ = [
    "aligned",
    "byte_size",
    "changed_words",
    "display_width",
    "few",
    "fit",
    "percent",
    "plain",
    "short_number",
    "visible",
    "whole_characters",
]

_SYMBOLS = {" ": "·", "\n": "⏎", "\t": "⇥"}
# Joiners shape emoji and Indic text; any other invisible character could hide or reorder what is around it.
_KEPT_IN_PROSE = frozenset("\n\t\u200c\u200d")


def visible(text: str) -> str:
    """A token with its spaces as ·, newlines as ⏎, tabs as ⇥ and anything invisible as its code point."""
    shown = "".join(_SYMBOLS.get(c) or (c if c.isprintable() else f"⟨{ord(c):02X}⟩") for c in text)
    if shown and unicodedata.combining(shown[0]):
        shown = "◌" + shown
    return shown or "∅"


def whole_characters(parts: Sequence[bytes | None]) -> tuple[str, ...]:
    """Characters of several tokens, at each token that holds a part of them; empty at any other.

    >>> parts = [bytes([byte]) for byte in "那".encode()]
    >>> whole_characters([*parts, None, parts[0]])
    ('那', '那', '那', '', '')

    Parameters
    ----------
    parts : sequence of bytes or None
        Bytes of each token that holds part of a character; None for any other.
    """
    found = [""] * len(parts)
    for is_text, group in groupby(range(len(parts)), lambda place: parts[place] is None):
        if not is_text:
            holders = [(place, byte) for place in group for byte in parts[place] or b""]
            for character in bytes(byte for _, byte in holders).decode(errors="surrogateescape"):
                size = len(character.encode(errors="surrogateescape"))
                places = {place for place, _ in holders[:size]}
                del holders[:size]
                for place in places if len(places) > 1 else ():
                    found[place] += character
    return tuple(found)


def plain(text: str) -> str:
    """Running text in which nothing can hide: invisible characters but for its layout as code points."""
    return "".join(c if c.isprintable() or c in _KEPT_IN_PROSE else f"⟨{ord(c):02X}⟩" for c in text)


def display_width(text: str) -> int:
    """Columns in a monospace font: 2 for East Asian wide characters, 0 for combining ones."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def fit(text: str, columns: int) -> str:
    """The text, cut with … where it is wider."""
    if display_width(text) <= columns:
        return text
    kept, width = "", 1
    for character in text:
        width += display_width(character)
        if width > columns:
            break
        kept += character
    return kept + "…"


def few(texts: Iterable[str], most: int = 4) -> str:
    """Texts with commas between them, of many the first ones and how many more there are.

    >>> few("abc"), few("abcdef")
    ('a, b, c', 'a, b, c and 3 more')
    """
    texts = list(texts)
    if len(texts) <= most:
        return ", ".join(texts)
    return f"{', '.join(texts[: most - 1])} and {len(texts) - most + 1} more"


def percent(probability: float) -> str:
    """A probability as `97.1%`, `0.034%`."""
    share = 100 * probability
    return f"{share:.1f}%" if share >= 0.95 or share == 0 else f"{share:.2g}%"


def short_number(value: float) -> str:
    """A number in at most three digits: `0.5`, `−1.2`, `12`, `10k`, `∞`."""
    if abs(value) == math.inf:
        return "∞" if value > 0 else "\u2212∞"
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return short_number(value / unit) + letter
    return f"{value:.3g}".replace("-", "\u2212")


def byte_size(n_bytes: int) -> str:
    """Bytes as `312 MiB`, `15.0 GiB`; a lack of them as `−3.2 GiB`."""
    value, sign = float(abs(n_bytes)), "−" if n_bytes < 0 else ""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{sign}{value:.0f} {unit}"
        value /= 1024
    return f"{sign}{value:.1f} GiB"


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; a column whose name begins with > is set flush right, and the last is never padded."""
    cells = [[name.lstrip(">") for name in columns], *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [name.startswith(">") for name in columns]
    return [
        "  ".join(
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]


def changed_words(
    one: str, other: str, *, growing: bool = False
) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Each text in parts, with whether the other text lacks their words.

    >>> changed_words("a good day", "an awful day")
    ([('a good', True), (' day', False)], [('an awful', True), (' day', False)])

    Parameters
    ----------
    one, other : str
    growing : bool
        More may follow in both: words are paired only where nothing that follows can pair them otherwise, so that a
        word once found in the other text stays found.
    """
    words = _words(one), _words(other)
    bare = [[word.strip() for word in side] for side in words]
    found: tuple[set[int], set[int]] = set(), set()
    start, start_other = 0, 0
    while pair := _nearest_pair(bare[0][start:], bare[1][start_other:], growing):
        found[0].add(start + pair[0])
        found[1].add(start_other + pair[1])
        start, start_other = start + pair[0] + 1, start_other + pair[1] + 1
    return _marked(words[0], found[0]), _marked(words[1], found[1])


def _words(text: str) -> list[str]:
    """Words, each with the space before it: joined again they are the text."""
    return re.findall(r"\s*\S+|\s+$", text)


def _nearest_pair(one: list[str], other: list[str], growing: bool) -> tuple[int, int] | None:
    """Places of the first word that both have, looked for as far in the one as in the other.

    A longest common subsequence, which looks at all at once, would pair words anew with each one that comes.
    """
    places: dict[str, int] = {}
    places_other: dict[str, int] = {}
    for place, (word, word_other) in enumerate(zip(one, other, strict=False) if growing else zip_longest(one, other)):
        places.setdefault(word, place)
        places_other.setdefault(word_other, place)
        pairs = [(place, places_other[word])] if word in places_other else []
        if word_other in places:
            pairs.append((places[word_other], place))
        if pairs:
            return min(pairs, key=sum)
    return None


def _marked(words: list[str], found: set[int]) -> list[tuple[str, bool]]:
    """Stretches of words that are found alike, without a mark on the space before them."""
    parts = []
    for changed, places in groupby(range(len(words)), lambda place: place not in found):
        text = "".join(words[place] for place in places)
        space = text[: len(text) - len(text.lstrip())] if changed else ""
        parts += [(space, False), (text.removeprefix(space), changed)]
    return [part for part in parts if part[0]]
