"""How a text goes on behind a prompt: with the space that words have between them, unless one is there."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nblens.model.tokens import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["continued", "end_of"]

_EMPHASIS = "\"'*`"  # around words: what they stand behind decides
_ENDS_CLAUSE = ".,;:!?…%"
_WITHOUT_SPACES = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "FULLWIDTH", "THAI", "LAO", "KHMER", "MYANMAR")
_TAIL = 32  # tokens that settle how the next one is spelt


def continued(text: str, before: str) -> str:
    """A text as it goes on behind another: a word gets a space where the other ends in a word or closes one.

    >>> continued("Paris", "The capital of France is"), continued("Paris", "France ->"), continued("A", "Answer:")
    (' Paris', ' Paris', ' A')

    All else stays what it is: what begins with a space or a sign, and words behind white space, an opening bracket or
    quote, a sign within a word, or a script that is written without spaces.

    >>> continued("A", "Answer: ("), continued("4", "2+2="), continued(".", "Paris"), continued("yes", "assistant\\n")
    ('A', '4', '.', 'yes')
    """
    if not text[:1].isalnum() or _is_unspaced(text[0]) or not before or before[-1].isspace():
        return text
    *others, last = before.rsplit(maxsplit=1)
    stem = last.rstrip(_EMPHASIS)
    amid_spaces = bool(others) and all(unicodedata.category(sign) in ("Sm", "Pd") for sign in last)
    return f" {text}" if amid_spaces or (stem and _closes(stem[-1])) else text


def end_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text with which tokens end, special tokens as they are written."""
    return decode(tokenizer, ids[-_TAIL:])


def _closes(character: str) -> bool:
    """Whether a word, or what ends with one, ends in it."""
    kind = unicodedata.category(character)
    ends = kind[0] in "LMN" or kind in ("Pe", "Pf") or character in _ENDS_CLAUSE
    return ends and not _is_unspaced(character)


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_WITHOUT_SPACES)
